"""Every case of folding: the function stays, codes are exact, and what cannot be folded is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnre_exp import (
    LayerRule,
    QuantScheme,
    UserError,
    activation_quantizers,
    bypassed,
    calibrate,
    fold_batch_norms,
    quantize,
    quantize_biases,
    reestimate_bn_stats,
    weight_quantizers,
)
from bnre_exp.quantsim.quantizers.affine import ChannelAffine
from tests.networks import BN, CONV, TRANSPOSED, Net, flat_cnn, randomize, unequal_batches

W4 = QuantScheme(weight_bits=4, act_bits=None)


def fold_and_compare(model, x, scheme=W4, mode="scale"):
    """Fold a float64 simulation; its outputs must agree to float64 rounding. Returns (sim, folded, report)."""
    sim = quantize(model.double().eval(), x.double(), scheme)
    folded, report = fold_batch_norms(sim, mode)
    with torch.no_grad(), bypassed(sim), bypassed(folded):
        expected, actual = sim(x.double()), folded(x.double())
    if not report.lossy:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    found = {name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert {bn for _, bn in report.folded} | {bn for bn, _ in report.kept} == found
    return sim, folded, report


def image(dim: int, channels: int, size: int = 7, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, *(size,) * dim)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize(("groups", "out"), [(1, 8), (2, 8), (4, 4), (4, 8)], ids=["plain", "grouped", "dw", "dw x2"])
@pytest.mark.parametrize("kind", [CONV, TRANSPOSED], ids=["conv", "transposed"])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_of_every_kind_is_folded(dim, groups, out, kind, bias):
    conv = kind[dim](4, out, 3, padding=1, stride=2, groups=groups, bias=bias)
    model = randomize(nn.Sequential(conv, BN[dim](out), nn.ReLU()))
    _, folded, report = fold_and_compare(model, image(dim, 4))
    assert report.folded == (("0", "1"),)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())


@pytest.mark.parametrize("kind", [CONV, TRANSPOSED], ids=["conv", "transposed"])
def test_codes_change_their_sign_only_and_scales_take_the_gain(kind):
    model = randomize(nn.Sequential(kind[2](4, 8, 3, groups=2), nn.BatchNorm2d(8))).eval()
    with torch.no_grad():  # weights at both ends of the grid
        model[0].weight[0, 0, 0, 0], model[0].weight[0, 0, 0, 1] = 9.0, -9.0
    sim = quantize(model, image(2, 4), QuantScheme(weight_bits=4, act_bits=None, weight_range="minmax"))
    quantizer, layer = weight_quantizers(sim)["0"], sim.get_submodule("0")
    codes = quantizer.codes(layer.parametrizations.weight.original)
    folded, _ = fold_batch_norms(sim)
    new = folded.get_submodule("0").parametrizations.weight
    gain = model[1].weight.double() / (model[1].running_var.double() + model[1].eps).sqrt()
    sign = quantizer.layout.expand(gain.sign()).to(codes.dtype)
    assert new.original.dtype == torch.int8 and torch.equal(new.original, codes * sign)
    assert int(new.original.min()) == -7 and int(new.original.max()) == 7
    alive = gain != 0
    torch.testing.assert_close(new[0].scale[alive].double(), (quantizer.scale.double() * gain.abs())[alive])
    assert not alive.all() and torch.equal(new[0].scale[~alive], quantizer.scale[~alive])


def test_linear_before_bn_is_folded_on_two_dimensions_and_never_on_three():
    linear_bn = randomize(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)))
    assert fold_and_compare(linear_bn, torch.randn(4, 5))[2].folded == (("0", "1"),)
    wide = randomize(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)))
    _, folded, report = fold_and_compare(wide, torch.randn(4, 6, 5))
    assert report.folded == () and "axis" in dict(report.kept)["1"]
    assert isinstance(folded.get_submodule("1"), ChannelAffine)


LAYERS = [(kind, dim, groups) for kind in (CONV, TRANSPOSED) for dim in (1, 2, 3) for groups in (1, 2, 4)]
every_layer = pytest.mark.parametrize(
    ("kind", "dim", "groups"),
    LAYERS,
    ids=[f"{'conv' if kind is CONV else 'transposed'}{dim}d-{groups}" for kind, dim, groups in LAYERS],
)


@every_layer
def test_second_consumer_of_the_layer(kind, dim, groups):
    conv = kind[dim](4, 4, 3, padding=1, groups=groups)
    model = randomize(Net(lambda m, x: m.bn(y := m.conv(x)) + y, conv=conv, bn=BN[dim](4)))
    report = fold_and_compare(model, image(dim, 4))[2]
    assert report.folded == () and "another consumer (add)" in dict(report.kept)["bn"]


@every_layer
def test_asking_for_the_shape_is_no_second_consumer(kind, dim, groups):
    def forward(m, x):
        y = m.conv(x)
        return m.bn(y).flatten(1).reshape_as(y) + 0 * y.shape[1] * y.dim()

    model = randomize(Net(forward, conv=kind[dim](4, 4, 3, padding=1, groups=groups), bn=BN[dim](4)))
    assert fold_and_compare(model, image(dim, 4))[2].folded == (("conv", "bn"),)


@every_layer
def test_activation_between_layer_and_bn(kind, dim, groups):
    model = randomize(nn.Sequential(kind[dim](4, 4, 3, groups=groups), nn.ReLU(), BN[dim](4)))
    report = fold_and_compare(model, image(dim, 4))[2]
    assert report.folded == () and "its input is 1 (ReLU)" in dict(report.kept)["2"]


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_channels_that_a_reshape_keeps_apart(dim):
    x = image(dim, 4, size=5)
    conv = randomize(Net(lambda m, x: m.bn(m.conv(x).flatten(2)), conv=CONV[dim](4, 6, 3), bn=nn.BatchNorm1d(6)))
    assert fold_and_compare(conv, x)[2].folded == (("conv", "bn"),)
    mixed = Net(
        lambda m, x: m.bn(m.conv(x).reshape(x.shape[0], 12, -1)), conv=CONV[dim](4, 6, 2), bn=nn.BatchNorm1d(12)
    )
    assert "axis" in dict(fold_and_compare(randomize(mixed), x)[2].kept)["bn"]


def test_a_small_example_hides_no_scramble():
    def batch_and_channels(m, x):
        return m.bn(m.conv(x).transpose(0, 1).reshape(-1, 4, 5, 5))

    def rows_and_channels(m, x):
        return m.bn(m.conv(x).permute(0, 2, 3, 1).reshape(x.shape))

    for forward, x in ((batch_and_channels, image(2, 4, size=5, batch=1)), (rows_and_channels, image(2, 4, size=1))):
        model = randomize(Net(forward, conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)))
        assert fold_and_compare(model, x)[2].folded == ()


def test_a_view_that_merges_the_channels_is_no_obstacle():
    def forward(m, x):
        return m.fc(m.bn(m.conv(x)).view(x.shape[0], -1)) + m.fc(m.other(x).view(x.size(0), -1))

    layers = {"conv": nn.Conv2d(3, 2, 1), "other": nn.Conv2d(3, 2, 1), "bn": nn.BatchNorm2d(2), "fc": nn.Linear(98, 5)}
    assert fold_and_compare(randomize(Net(forward, **layers)), image(2, 3))[2].folded == (("conv", "bn"),)


def test_inputs_by_keyword():
    layers = {"conv": nn.Conv2d(3, 3, 1), "skip": nn.Identity(), "bn": nn.BatchNorm2d(3), "late": nn.BatchNorm2d(3)}
    model = randomize(Net(lambda m, x: m.late(input=torch.relu(m.bn(input=m.skip(input=m.conv(input=x))))), **layers))
    report = fold_and_compare(model, image(2, 3))[2]
    assert report.folded == (("conv", "bn"),) and [bn for bn, _ in report.kept] == ["late"]


@pytest.mark.parametrize(
    ("move", "folded"),
    [
        (lambda y: y.transpose(1, 2), True),
        (lambda y: y.permute(0, 2, 1), True),
        (lambda y: y.flatten(0, 1), True),
        (lambda y: y.reshape(-1, y.shape[-1]), True),
        (lambda y: y, False),
        (lambda y: y.flatten(1)[:, :6], False),
        (lambda y: y.transpose(1, 2).flip(1), False),
    ],
)
@pytest.mark.parametrize("length", [6, 7])  # 6: as many as channels
def test_linear_whose_channels_are_moved_to_where_bn_wants_them(move, folded, length):
    model = randomize(Net(lambda m, x: m.bn(move(m.linear(x))), linear=nn.Linear(5, 6), bn=nn.BatchNorm1d(6)))
    if length == 7 and move(torch.zeros(2, 7, 6)).shape[1] == 7:
        model.bn = randomize(nn.BatchNorm1d(7))
    report = fold_and_compare(model, torch.randn(3, length, 5))[2]
    assert (report.folded == (("linear", "bn"),)) is folded and (report.kept == ()) is folded


@pytest.mark.parametrize("scheme", [W4, QuantScheme(weight_bits=4, act_bits=8)], ids=["w4", "w4a8"])
def test_bn_without_a_layer_before_it_becomes_an_affine(scheme):
    layers = {"bn": nn.BatchNorm2d(3), "conv": nn.Conv2d(3, 4, 3), "late": nn.BatchNorm2d(4)}
    model = randomize(Net(lambda m, x: m.late(torch.relu(m.conv(m.bn(x)))), **layers))
    sim = quantize(model.eval(), image(2, 3), scheme)
    calibrate(sim, [image(2, 3)], 1)
    folded, report = fold_batch_norms(sim)
    assert dict(report.kept)["bn"].startswith("no conv or linear layer directly before it (its input is the network's")
    assert "relu" in dict(report.kept)["late"]
    x = image(2, 3)
    with torch.no_grad(), bypassed(sim), bypassed(folded):
        torch.testing.assert_close(folded(x), sim.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_quantizer_between_conv_and_bn_keeps_them_apart():
    sim = quantize(randomize(flat_cnn()), image(2, 3), QuantScheme())
    conv, bn = (next(n for n in sim.graph.nodes if n.target == target) for target in ("0", "1"))
    quantizer = next(n for n in sim.graph.nodes if str(n.target).startswith("act_quantizers."))
    with sim.graph.inserting_after(conv):
        between = sim.graph.call_module(quantizer.target, ())
    bn.replace_input_with(conv, between)
    between.args = (conv,)
    sim.recompile()
    _, report = fold_batch_norms(sim)
    assert dict(report.kept)["1"] == "a quantizer between the layer and the BN"


@every_layer
def test_pair_called_twice_is_folded_when_every_call_agrees(kind, dim, groups):
    conv = kind[dim](4, 4, 3, padding=1, groups=groups)
    model = randomize(Net(lambda m, x: m.bn(m.conv(m.bn(m.conv(x)))), conv=conv, bn=BN[dim](4)))
    assert fold_and_compare(model, image(dim, 4))[2].folded == (("conv", "bn"),)


@pytest.mark.parametrize(
    ("forward", "word"),
    [
        (lambda m, x: m.bn(m.conv(x)) + m.conv(x), "called more than once"),
        (lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)), "shared by several layers"),
        (lambda m, x: m.bn(m.conv(m.bn(x))), "no conv or linear layer directly before it"),
    ],
)
@every_layer
def test_calls_that_do_not_agree_keep_the_bn(forward, word, kind, dim, groups):
    conv, other = (kind[dim](4, 4, 3, padding=1, groups=groups) for _ in range(2))
    model = randomize(Net(forward, conv=conv, other=other, bn=BN[dim](4)))
    report = fold_and_compare(model, image(dim, 4))[2]
    assert report.folded == () and word in dict(report.kept)["bn"]


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_bn_before_a_depthwise_conv_is_folded_exactly_without_padding_only(dim, multiplier):
    for padding, folded in ((0, True), (1, False)):
        conv = CONV[dim](4, 4 * multiplier, 3, padding=padding, groups=4)
        model = randomize(nn.Sequential(nn.Identity(), BN[dim](4), conv, nn.ReLU()))
        report = fold_and_compare(model, image(dim, 4))[2]
        assert (report.folded == (("2", "1"),)) is folded
        assert (report.kept == ()) is folded


@every_layer
def test_bn_before_any_other_layer_stays(kind, dim, groups):
    padding = 1 if kind is CONV and groups == 4 else 0  # without it, that one takes the BN in
    model = randomize(nn.Sequential(BN[dim](4), kind[dim](4, 4, 3, groups=groups, padding=padding)))
    assert [bn for bn, _ in fold_and_compare(model, image(dim, 4))[2].kept] == ["0"]


@every_layer
def test_bn_that_the_forward_pass_never_reaches(kind, dim, groups):
    model = Net(lambda m, x: m.bn(m.conv(x)), conv=kind[dim](4, 4, 3, groups=groups), bn=BN[dim](4), spare=BN[dim](4))
    report = fold_and_compare(randomize(model), image(dim, 4))[2]
    assert report.folded == (("conv", "bn"),) and "never reached" in dict(report.kept)["spare"]


def test_bn_without_affine_without_statistics_and_subclasses():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
        nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4), nn.ReLU(),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Conv2d(4, 4, 1), Odd(4),
    )  # fmt: skip
    _, _, report = fold_and_compare(randomize(model), image(2, 3))
    assert report.folded == (("0", "1"), ("3", "4"))
    kept = dict(report.kept)
    assert "no running statistics" in kept["7"] and "stays a batch norm" in kept["7"]
    assert "subclass" in kept["10"] and "Odd" in kept["10"]


def test_bn_with_a_built_in_activation_is_split_and_folded():
    class BatchNormAct(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    shared = BatchNormAct(4)
    model = randomize(
        nn.Sequential(nn.Conv2d(4, 4, 1), shared, nn.Conv2d(4, 4, 1), BatchNormAct(4), nn.Conv2d(4, 4, 1))
    )
    assert fold_and_compare(model, image(2, 4))[2].folded == (("0", "1"), ("2", "3"))


def test_per_tensor_and_weight_mode_are_lossy_and_say_so():
    per_tensor = QuantScheme(weight_bits=8, act_bits=None, per_channel=False)
    for scheme, mode in ((per_tensor, "scale"), (QuantScheme(weight_bits=8, act_bits=None), "weight")):
        sim = quantize(randomize(flat_cnn()).double().eval(), image(2, 3).double(), scheme)
        with torch.no_grad():  # as training may leave it: not where fitting would put it
            for quantizer in weight_quantizers(sim).values():
                quantizer.scale *= 1.1
            folded, report = fold_batch_norms(sim, mode)
            assert [layer for layer, _ in report.lossy] == ["0", "3", "6"]
            x = image(2, 3).double()
            difference = (sim(x) - folded(x)).abs().max() / sim(x).abs().max()
        assert 1e-9 < difference < 0.1
        assert folded.get_submodule("0").parametrizations.weight[0].scale.numel() == (8 if scheme.per_channel else 1)


def test_an_unquantized_layer_is_folded_in_floating_point():
    scheme = QuantScheme(weight_bits=4, act_bits=8, overrides=(LayerRule("0", off=True),))
    _, folded, report = fold_and_compare(randomize(flat_cnn()), image(2, 3), scheme)
    assert len(report.folded) == 3 and isinstance(folded.get_submodule("0").weight, nn.Parameter)


def test_the_simulation_is_unaffected_and_undo_still_works():
    sim = quantize(randomize(flat_cnn()), image(2, 3), QuantScheme(weight_bits=4)).eval()
    batches = unequal_batches((3, 7, 7))
    calibrate(sim, batches, 4)
    x = batches[0]
    with torch.no_grad():
        original = sim(x)
        handle = reestimate_bn_stats(sim, batches, 4)
        reestimated = sim(x)
        folded, _ = fold_batch_norms(sim)
        after_fold = folded(x)
        assert torch.equal(sim(x), reestimated)
        handle.remove()
        assert torch.equal(sim(x), original) and torch.equal(folded(x), after_fold)
        assert not torch.equal(original, reestimated)
    sim.train()(x).sum().backward()
    assert sim.get_submodule("0").parametrizations.weight.original.grad is not None


def test_a_weight_that_is_read_elsewhere_is_left_alone():
    def forward(m, x):
        return F.conv_transpose2d(F.relu(m.bn(m.conv(x))), m.conv.weight)

    model = randomize(Net(forward, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)))
    report = fold_and_compare(model, image(2, 3))[2]
    assert report.folded == () and "also read elsewhere" in dict(report.kept)["bn"]


@pytest.mark.parametrize("bits", [4, None])
def test_tied_weights_are_folded_each_by_its_own_bn(bits):
    model = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[2].weight = model[0].weight
    report = fold_and_compare(model, image(2, 3), QuantScheme(weight_bits=bits, act_bits=None))[2]
    assert report.folded == (("0", "1"), ("2", "3"))


def test_hooks_and_modules_kept_whole_are_named():
    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x))

    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Leaf())).eval()
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    _, report = fold_batch_norms(quantize(model, image(2, 3), W4, leaf_modules=["Leaf"]))
    assert "hook" in dict(report.kept)["1"] and "kept whole" in dict(report.kept)["2.bn"]


def test_biases_need_ranges():
    folded, _ = fold_batch_norms(quantize(randomize(flat_cnn()), image(2, 3), QuantScheme()))
    with pytest.raises(UserError, match="calibrate"):
        quantize_biases(folded)


def test_misuse_is_refused():
    sim = quantize(randomize(flat_cnn()), image(2, 3), W4)
    with pytest.raises(UserError, match="mode='both'"):
        fold_batch_norms(sim, mode="both")
    with pytest.raises(UserError, match="quantize"):
        fold_batch_norms(flat_cnn())
    with pytest.raises(UserError, match="folded already"):
        fold_batch_norms(fold_batch_norms(sim)[0])


def test_tiny_and_huge_gains_give_sound_scales():
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1e-30, -1e-38, 1e4, 0.0]))
    sim = quantize(model.eval(), image(2, 3), QuantScheme(weight_bits=4, act_bits=8))
    calibrate(sim, [image(2, 3)], 1)
    folded, _ = fold_batch_norms(sim)
    x = image(2, 3)
    with torch.no_grad(), bypassed(sim), bypassed(folded):
        expected = sim(x)
        torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        report = quantize_biases(folded)
        scale = folded.get_submodule("0").parametrizations.weight[0].scale
        assert bool((scale > 1e-30).all()) and report.rounded == ("0",)
        small = [0, 1, 3]  # the channel of gain 1e4 has a coarse grid for its bias, rightly
        torch.testing.assert_close(folded(x)[:, small], expected[:, small], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("per_channel", [True, False])
def test_biases_lie_on_the_grid_of_input_and_weight_scale(per_channel):
    sim = quantize(randomize(flat_cnn()), image(2, 3), QuantScheme(weight_bits=4, act_bits=4, per_channel=per_channel))
    calibrate(sim, unequal_batches((3, 7, 7)), 4)
    folded, _ = fold_batch_norms(sim)
    before = {name: folded.get_submodule(name).bias.detach().clone() for name in ("0", "3", "6", "11")}
    assert quantize_biases(folded).rounded == ("0", "3", "6", "11")
    quantizers = {n.name: n for n in folded.graph.nodes if str(n.target).startswith("act_quantizers.")}
    for name, bias in before.items():
        layer = folded.get_submodule(name)
        codes, scale = layer.parametrizations.bias.original, layer.parametrizations.bias[0].scale
        weight_scale = layer.parametrizations.weight[0].scale
        node = next(n for n in folded.graph.nodes if n.target == name)
        source = node.args[0]
        while source.name not in quantizers:
            source = source.args[0]
        step = float(folded.get_submodule(source.target).scale.detach().abs()) * weight_scale.double()
        assert codes.dtype == torch.int32
        torch.testing.assert_close(scale.double().unique(), step.unique(), rtol=1e-6, atol=0)
        assert bool(((layer.bias - bias).abs() <= 0.5001 * step.float() + 1e-6 * bias.abs()).all())


def test_a_bias_that_does_not_fit_raises_its_weight_scale():
    sim = quantize(randomize(flat_cnn()), image(2, 3), QuantScheme(weight_bits=8, act_bits=8))
    calibrate(sim, unequal_batches((3, 7, 7)), 4)
    folded, _ = fold_batch_norms(sim)
    bias = folded.get_submodule("0").bias.detach().clone()
    report = quantize_biases(folded, bits=8)
    assert ("0", 8) in report.rescaled or any(name == "0" for name, _ in report.rescaled)
    layer = folded.get_submodule("0")
    step = layer.parametrizations.bias[0].scale
    assert bool(((layer.bias - bias).abs() <= 0.51 * step).all())


def test_biases_without_a_known_grid_stay_and_are_named():
    folded, _ = fold_batch_norms(quantize(randomize(flat_cnn()), image(2, 3), W4))
    report = quantize_biases(folded)
    assert report.rounded == () and set(dict(report.kept).values()) == {"its input is not quantized"}


def test_functional_relu_and_residuals_fold_alike():
    layers = {
        "a": nn.Conv2d(3, 3, 3, padding=1),
        "b": nn.BatchNorm2d(3),
        "c": nn.Conv2d(3, 3, 1),
        "d": nn.BatchNorm2d(3),
    }
    model = randomize(Net(lambda m, x: F.relu(m.d(m.c(F.relu(m.b(m.a(x))))) + x), **layers))
    assert fold_and_compare(model, image(2, 3))[2].folded == (("a", "b"), ("c", "d"))


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("1.running_var", float("nan"), "1.running_var is not finite"),
        ("1.running_var", -1e-3, "1.running_var is negative"),
        ("1.running_mean", float("inf"), "1.running_mean is not finite"),
        ("1.weight", float("nan"), "1.weight is not finite"),
        ("1.bias", float("nan"), "1.bias is not finite"),
        ("0.parametrizations.weight.original", float("nan"), "0.weight is not finite"),
        ("0.parametrizations.weight.0.scale", float("nan"), "0.weight.0.scale is not finite"),
        ("11.bias", float("inf"), "11.bias is not finite"),
    ],
)
def test_what_nothing_can_be_computed_with_is_not_folded_and_named(tensor, value, message):
    sim = quantize(randomize(flat_cnn()), image(2, 3), W4)
    tensors = {**dict(sim.named_parameters()), **dict(sim.named_buffers())}
    with torch.no_grad():
        tensors[tensor].view(-1)[0] = value
    with pytest.raises(UserError, match=f"fold_batch_norms: {message}"):
        fold_batch_norms(sim)


@pytest.mark.parametrize("tensor", ["scale", "zero_point"])
def test_a_quantizer_with_a_range_that_is_not_finite_is_not_folded_and_named(tensor):
    sim = quantize(randomize(flat_cnn()), image(2, 3), QuantScheme())
    fold_batch_norms(sim)  # without ranges, as for weights alone
    calibrate(sim, [image(2, 3)], 1)
    name, quantizer = next(iter(activation_quantizers(sim).items()))
    getattr(quantizer, tensor).data.fill_(float("nan"))
    with pytest.raises(UserError, match=f"{name}.{tensor} is not finite"):
        fold_batch_norms(sim)
