"""Layers and BNs whose classes are not torch's own: timm's, torchvision's, a user's."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bnre_exp import (
    QuantScheme,
    UserError,
    activation_quantizers,
    bypassed,
    calibrate,
    fold_batch_norms,
    load_folded,
    quantize,
    quantize_biases,
    reestimate_bn_stats,
    save_folded,
    sim_report,
    weight_quantizers,
)
from tests.networks import Net, randomize

X = torch.randn(3, 4, 9, 9)
W4 = QuantScheme(weight_bits=4, act_bits=8)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)  # linear in the weight, but the bias counts twice


class Squared(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight.square(), self.bias)


class Plain(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Clamped(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.clamp(-200, 200))


class ByBatch(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training or y.shape[0] < 40 else y * 2


class WithNorm(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args, bias=False)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        return self.norm(super().forward(x))


class WithMethod(nn.Conv2d):
    def scaled(self, x):
        return 2 * self(x)

    def forward(self, x, gain=None):
        y = super().forward(x)
        return y if gain is None else y * gain


class InTraining(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (0.5 if self.training else 1)


def folding_error(sim, x=X):
    folded, report = fold_batch_norms(sim.double())
    with torch.no_grad(), bypassed(sim), bypassed(folded):
        return float((sim.eval()(x.double()) - folded(x.double())).abs().max()), folded, report


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 9])
def test_a_conv_that_pads_in_its_own_way_is_quantized_and_folded(stride, size, tmp_path):
    layer = timm.layers.Conv2dSame(4, 6, 3, stride=stride, bias=False)
    model = randomize(nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU())).eval()
    x = torch.randn(3, 4, size, size)
    sim = quantize(model, x, W4)
    assert list(weight_quantizers(sim)) == ["0"] and sim_report(sim).unquantized == ()
    calibrate(sim, [x], 1)
    folded, report = fold_batch_norms(sim)
    quantize_biases(folded)
    assert report.folded == (("0", "1"),)
    assert save_folded(folded, tmp_path / "net") == ("0 (timm.layers.conv2d_same.Conv2dSame)",)
    loaded = load_folded(tmp_path / "net", model=model)
    assert torch.equal(loaded(x), folded(x))
    assert folding_error(sim, x)[0] < 1e-9


def test_bn_before_a_depthwise_conv_that_pads_in_its_own_way_is_kept():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), timm.layers.Conv2dSame(4, 4, 3, groups=4))
    error, _, report = folding_error(quantize(randomize(model).eval(), X, W4))
    assert error < 1e-9 and [bn for bn, _ in report.kept] == ["1"]


@pytest.mark.parametrize("kind", [timm.layers.StdConv2d, timm.layers.ScaledStdConv2d, Doubled, Squared, Clamped])
def test_a_layer_that_computes_with_another_weight_stays_float_and_is_named(kind):
    model = randomize(nn.Sequential(kind(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU())).eval()
    sim = quantize(model, X, W4)
    assert not weight_quantizers(sim)
    assert sim_report(sim).unquantized == (
        ("0", f"{kind.__name__} does not simply multiply with its weight; stays float"),
    )
    error, _, report = folding_error(sim)
    assert error < 1e-9 and [bn for bn, _ in report.kept] == ["1"]


def test_a_layer_that_does_what_its_base_class_does_becomes_that(tmp_path):
    shared = Plain(4, 4, 3, padding=1)
    model = nn.Sequential(
        shared, nn.ReLU(), shared, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), timm.layers.Linear(4, 5)
    )
    sim = quantize(randomize(model).eval(), X, W4)
    assert set(weight_quantizers(sim)) == {"0", "6"}
    assert [node.target for node in sim.graph.nodes].count("0") == 2  # still one layer, called twice
    calibrate(sim, [X], 1)
    folded, _ = fold_batch_norms(sim)
    assert save_folded(folded, tmp_path / "net") == ()
    assert torch.equal(load_folded(tmp_path / "net")(X), folded(X))


def test_a_layer_that_decides_by_sizes_keeps_its_own_forward():
    sim = quantize(randomize(nn.Sequential(ByBatch(4, 6, 1), nn.ReLU())).eval(), X, W4)
    assert type(sim.get_submodule("0")).__name__.endswith("ByBatch")


def test_a_layer_with_a_norm_inside_is_kept_whole_and_loads(tmp_path):
    model = randomize(nn.Sequential(WithNorm(4, 6, 1), nn.ReLU())).eval()
    sim = quantize(model, X, W4)
    calibrate(sim, [X], 1)
    folded, report = fold_batch_norms(sim)
    assert dict(report.kept) == {"0.norm": "inside a module that was kept whole; stays a batch norm"}
    save_folded(folded, tmp_path / "net")
    assert torch.equal(load_folded(tmp_path / "net", model=model)(X), folded(X))


def test_what_else_a_layer_of_a_subclass_offers_stays_usable():
    def forward(m, x):
        return m.late(m.conv(m.bn(m.conv.scaled(x)), 0.5))

    modules = {"conv": WithMethod(4, 4, 1), "bn": nn.BatchNorm2d(4), "late": nn.BatchNorm2d(4)}
    model = randomize(Net(forward, **modules)).eval()
    error, _, report = folding_error(quantize(model, X, W4))
    assert error < 1e-9 and report.folded == ()


def test_layers_that_a_plain_list_holds_as_well():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = []
            for index, part in enumerate((Plain(4, 4, 1), nn.SyncBatchNorm(4))):
                self.add_module(f"part{index}", part)
                self.parts.append(part)

        def forward(self, x):
            for part in self.parts:
                x = part(x)
            return x

    error, _, report = folding_error(quantize(randomize(Pyramid()).eval(), X, W4))
    assert error < 1e-9 and report.folded == (("part0", "part1"),)


def test_a_leaf_is_named_by_the_class_that_the_user_wrote():
    model = nn.Sequential(Plain(4, 4, 1), nn.BatchNorm2d(4))
    sim = quantize(randomize(model).eval(), X, W4, leaf_modules=["Plain"])
    assert type(sim.get_submodule("0")).__name__.endswith("Plain")


def test_hooks_of_the_user_see_their_own_data_only():
    model, seen = nn.Sequential(Plain(4, 4, 1), nn.BatchNorm2d(4)).eval(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape[1:])))
    quantize(model, X, W4)
    assert set(seen) == {(4, 9, 9)}


class OldDropout(nn.Module):
    """Scales in evaluation mode instead, and in place."""

    def forward(self, x):
        return x * (torch.rand_like(x) > 0.5) if self.training else x.mul_(0.5)


class Limit(nn.Module):
    def forward(self, x):
        return x if self.training or x.abs().max() < 100 else x.clamp(-1, 1)


@pytest.mark.parametrize("kind", [OldDropout, Limit])
def test_only_what_never_does_anything_is_dropped_at_the_fold(kind):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), kind(), nn.Conv2d(4, 2, 1))
    sim = quantize(randomize(model).eval(), X, W4)
    assert folding_error(sim)[0] < 1e-9 and folding_error(sim, X * 1000)[0] < 1e-6


def test_a_layer_that_differs_in_training_mode_keeps_its_class():
    model = nn.Sequential(nn.Flatten(), InTraining(324, 5), nn.BatchNorm1d(5))
    sim = quantize(randomize(model).eval(), X, W4)
    assert not weight_quantizers(sim) and fold_batch_norms(sim)[1].folded == ()


def test_frozen_batch_norm_is_folded_and_never_re_estimated():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6), nn.ReLU(), FrozenBatchNorm2d(6), nn.BatchNorm2d(6))
    with torch.no_grad():
        for bn in (model[1], model[3]):
            bn.weight.copy_(torch.tensor([0.0, -1.0, 2.0, -0.5, 1.0, 3.0]))
            bn.bias.normal_(), bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    sim = quantize(model.eval(), X, W4)
    calibrate(sim, [X], 1)
    before = {key: value.clone() for key, value in sim.state_dict().items()}
    handle = reestimate_bn_stats(sim, [X], 1)
    assert handle.frozen == ("1", "3")
    changed = {key for key, value in sim.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"4.running_mean", "4.running_var"}
    error, folded, report = folding_error(sim)
    assert error < 1e-9 and report.folded == (("0", "1"),) and [bn for bn, _ in report.kept] == ["3", "4"]
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in folded.modules())
    with pytest.raises(UserError, match="All 1 batch norms of the model are FrozenBatchNorm2d"):
        reestimate_bn_stats(nn.Sequential(nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6)), [X], 1)


def test_stochastic_depth_of_timm_needs_no_code_once_folded(tmp_path):
    model = timm.create_model("test_resnet", drop_path_rate=0.2, num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    sim = quantize(randomize(model).eval(), x, W4)
    calibrate(sim, [x], 1)
    folded, _ = fold_batch_norms(sim)
    assert save_folded(folded, tmp_path / "net") == ()
    assert torch.equal(load_folded(tmp_path / "net")(x), folded(x))


@pytest.mark.slow
def test_layers_of_dropped_heads_are_named():
    googlenet = torchvision.models.googlenet(num_classes=10, init_weights=False)
    rows = dict(sim_report(quantize(googlenet, torch.randn(2, 3, 64, 64))).unquantized)
    dropped = {"aux1.conv.conv", "aux1.fc1", "aux1.fc2", "aux2.conv.conv", "aux2.fc1", "aux2.fc2"}
    assert {name for name, reason in rows.items() if "never reached" in reason} == dropped


class PaddedByModule(nn.Conv2d):
    def __init__(self, *args, pad=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.pad = nn.Identity() if pad is None else nn.ZeroPad2d(pad)

    def forward(self, x):
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def test_a_conv_that_pads_by_a_module_is_folded_also_where_that_does_nothing():
    model = nn.Sequential(
        PaddedByModule(3, 8, 3, pad=1), nn.BatchNorm2d(8), nn.ReLU(), PaddedByModule(8, 8, 1), nn.BatchNorm2d(8)
    )
    randomize(model).eval()
    x = torch.randn(4, 3, 12, 12)
    sim = quantize(model, x, QuantScheme(4, None))
    assert list(weight_quantizers(sim)) == ["0", "3"]
    folded, report = fold_batch_norms(sim)
    assert report.folded == (("0", "1"), ("3", "4"))
    torch.testing.assert_close(folded(x), sim(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("between", [nn.Dropout(0.3), nn.Dropout2d(0.3), nn.AlphaDropout(0.3), nn.Identity()])
def test_dropout_between_layer_and_bn_does_not_keep_them_apart(between):
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.BatchNorm2d(8), nn.ReLU())).eval()
    x = torch.randn(4, 3, 12, 12)
    sim = quantize(model, x, QuantScheme(4, 8))
    calibrate(sim, [x], 1)
    folded, report = fold_batch_norms(sim)
    assert report.folded == (("0", "2"),) and len(activation_quantizers(sim)) == 2
    torch.testing.assert_close(folded(x), sim(x), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    first = sim.train()(x)
    assert type(between) is nn.Identity or not torch.equal(first, sim(x))  # it drops when trained, before the BN
