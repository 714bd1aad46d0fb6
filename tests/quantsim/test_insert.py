"""Where quantizers go, what is named instead, and that tracing keeps the network's behaviour."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from bnre_exp import (
    LayerRule,
    QuantScheme,
    UserError,
    activation_quantizers,
    bypassed,
    calibrate,
    quantize,
    sim_report,
    weight_quantizers,
)
from tests.networks import Net, flat_cnn, randomize
from tests.torchvision_networks import network

X = torch.randn(4, 3, 16, 16)


def placed(sim) -> dict[str, bool]:
    """Label -> unsigned, in order of execution."""
    return {quantizer.label: quantizer.unsigned for quantizer in activation_quantizers(sim).values()}


def test_one_quantizer_at_the_end_of_each_group():
    sim = quantize(flat_cnn(), X)
    assert list(placed(sim).items())[1:] == [("0", True), ("3", True), ("6", True), ("9", True), ("11", False)]
    assert list(placed(sim).values())[0] is False  # the input
    assert list(weight_quantizers(sim)) == ["0", "3", "6", "11"]


@pytest.mark.parametrize(
    ("name", "convs", "additions"), [("small resnet", 6, 2), pytest.param("resnet18", 20, 8, marks=pytest.mark.slow)]
)
def test_residual_network_quantizes_every_op_once(name, convs, additions):
    sim = quantize(network(name), torch.randn(2, 3, 32, 32))
    assert len(placed(sim)) == 1 + convs + additions + 1 + 1  # input, convs, additions, average pool, fc
    assert len(weight_quantizers(sim)) == convs + 1
    for node in sim.graph.nodes:
        if str(node.target).startswith("act_quantizers."):
            assert not str(node.args[0].target).startswith("act_quantizers.")
    assert sim_report(sim).unquantized == ()


def test_smooth_activations_get_a_quantizer_before_and_after():
    layers = {"conv": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3), "act": nn.SiLU()}
    sim = quantize(Net(lambda m, x: m.act(m.bn(m.conv(x))), **layers), X)
    assert placed(sim) == {"x": False, "conv": False, "act": False}


@pytest.mark.parametrize(
    ("op", "unsigned"),
    [
        (lambda x: torch.sigmoid(x), True),
        (lambda x: F.leaky_relu(x), False),
        (lambda x: F.relu6(x), True),
        (lambda x: torch.cat([x, x], 1), False),
        (lambda x: torch.cat([F.relu(x), torch.sigmoid(x)], 1), True),
        (lambda x: F.relu(x) * torch.sigmoid(x), True),
        (lambda x: F.relu(x) * -1, False),
        (lambda x: torch.add(F.relu(x), F.relu(x), alpha=-2), False),
        (lambda x: torch.add(F.relu(x), other=-1.0), False),
        (lambda x: F.relu(x) * (1 - x.size(1)), False),
        (lambda x: F.relu(x) - 1, False),
        (lambda x: F.avg_pool2d(F.relu(x), 2), True),
        (lambda x: x.mean((2, 3)), False),
        (lambda x: F.interpolate(x, scale_factor=2.0), False),
        (lambda x: torch.softmax(x, 1), True),
        (lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2), False),
    ],
)
def test_ops_that_compute_are_quantized_and_unsigned_only_if_provably_so(op, unsigned):
    sim = quantize(Net(lambda m, x: op(m.conv(x)), conv=nn.Conv2d(3, 3, 1)), X)
    last = [q for q in activation_quantizers(sim).values()][-1]
    assert last.unsigned is unsigned
    output = next(n for n in sim.graph.nodes if n.op == "output").args[0]
    assert str(output.target).startswith("act_quantizers.")


def test_ops_that_move_values_get_none():
    def forward(m, x):
        x = F.max_pool2d(m.conv(x), 2)
        a, b = x.flatten(1).view(4, -1).chunk(2, dim=1)
        return m.drop(F.pad(a.reshape(4, -1), (0, 1))), b.contiguous()

    sim = quantize(Net(forward, conv=nn.Conv2d(3, 2, 1), drop=nn.Identity()), X)
    assert list(placed(sim)) == ["x", "conv"]


def test_padding_with_infinity_for_a_max_pooling_is_not_quantized():
    def forward(m, x):
        padded = F.pad(torch.relu(m.conv(x)), (1, 1, 1, 1), value=float("-inf"))
        return F.avg_pool2d(F.max_pool2d(padded, 3), 2)

    model = randomize(Net(forward, conv=nn.Conv2d(3, 3, 1))).eval()
    sim = quantize(model, X, QuantScheme(weight_bits=16, act_bits=16))
    calibrate(sim, [X], 1)
    assert placed(sim) == {"x": False, "conv": True, "avg_pool2d": True}
    torch.testing.assert_close(sim(X), model(X), rtol=1e-3, atol=1e-3)


def test_kept_bn_is_an_operation_of_its_own():
    layers = {"conv": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3)}
    sim = quantize(Net(lambda m, x: F.relu(m.bn(y := m.conv(x))) + y, **layers), X)
    assert placed(sim) == {"x": False, "conv": False, "relu": True, "add": False}


def test_bits_none_means_float():
    assert not activation_quantizers(quantize(flat_cnn(), X, QuantScheme(act_bits=None)))
    assert not weight_quantizers(quantize(flat_cnn(), X, QuantScheme(weight_bits=None)))


def test_overrides_and_first_last_bits():
    rules = (LayerRule("3", weight_bits=6, act_bits=5), LayerRule("9", off=True))
    scheme = QuantScheme(weight_bits=3, act_bits=4, first_last_bits=8, overrides=rules)
    sim = quantize(flat_cnn(), X, scheme)
    assert {name: q.bits for name, q in weight_quantizers(sim).items()} == {"0": 8, "3": 6, "6": 3, "11": 8}
    bits = {q.label: q.bits for q in activation_quantizers(sim).values()}
    assert bits["0"] == 4 and bits["3"] == 5 and bits["6"] == 4 and bits["11"] == 8 and "9" not in bits
    assert list(bits.values())[0] == 8
    assert ("9", "switched off by the override '9'") in sim_report(sim).unquantized
    with pytest.raises(UserError, match=r"pattern 'layer9\.\*' matches nothing.*0, 3, 6, 11"):
        quantize(flat_cnn(), X, QuantScheme(overrides=(LayerRule("layer9.*", off=True),)))


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (LayerRule("10", act_bits=4), "act_bits"),
        (LayerRule("9", weight_bits=4), "weight_bits"),
        (LayerRule("*.bn*", act_bits=4), "act_bits"),
        (LayerRule("pool", off=True), "off"),
    ],
)
def test_an_override_without_effect_is_an_error(rule, field):
    model = flat_cnn()
    model.append(nn.Sequential())
    names = {"10": "10", "9": "9", "*.bn*": None, "pool": None}
    if names[rule.pattern] is None:
        layers = {"conv": nn.Conv2d(3, 3, 1), "pool": nn.MaxPool2d(2), "m": nn.ModuleDict({"bnx": nn.MaxPool2d(2)})}
        model = Net(lambda m, x: m.m["bnx"](m.pool(m.conv(x))), **layers)
    with pytest.raises(UserError, match=f"{field} of the pattern .* has no effect"):
        quantize(model, X, QuantScheme(overrides=(rule,)))


@pytest.mark.parametrize("bits", [1, 17, 0, -3])
def test_bits_out_of_range(bits):
    for name in ("weight_bits", "act_bits", "first_last_bits"):
        with pytest.raises(UserError, match=f"{name}={bits}"):
            QuantScheme(**{name: bits})


def test_sixteen_bits_are_close_to_fp32_and_the_original_is_untouched():
    model = randomize(flat_cnn()).eval()
    state = copy.deepcopy(model.state_dict())
    sim = quantize(model, X, QuantScheme(weight_bits=16, act_bits=16, weight_range="minmax", act_range="minmax"))
    calibrate(sim, [X], 1)
    with torch.no_grad():
        torch.testing.assert_close(sim(X), model(X), rtol=1e-3, atol=1e-3 * float(model(X).abs().max()))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert type(model[0]) is nn.Conv2d


class WithAuxiliaryHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head_bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return (y, self.head_bn(y)) if self.training else y


def test_auxiliary_heads_are_dropped_and_their_bns_named():
    report = sim_report(quantize(WithAuxiliaryHead(), X))
    assert report.unreached_bns == ("head_bn",) and "auxiliary" in report.notes[0]


@pytest.mark.slow
def test_auxiliary_heads_of_torchvision():
    googlenet = torchvision.models.googlenet(num_classes=10, init_weights=False)
    assert set(sim_report(quantize(googlenet, torch.randn(2, 3, 64, 64))).unreached_bns) == {
        "aux1.conv.bn",
        "aux2.conv.bn",
    }


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.5)) * 2


def test_stochastic_layers_still_act_in_training_mode():
    def forward(m, x):
        return F.dropout(m.path(m.bn(m.conv(x))), 0.3, training=m.training)

    model = Net(forward, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3), path=DropPath())
    sim = quantize(model, X, QuantScheme(act_bits=None))
    for mode, zeros in ((True, True), (False, False)):
        with torch.no_grad():
            assert bool((sim.train(mode)(X) == 0).any()) is zeros


@pytest.mark.parametrize("name", ["mobilenet_v3_small", pytest.param("efficientnet_b0", marks=pytest.mark.slow)])
def test_torchvision_networks_train_as_before_when_quantizers_are_off(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10).train()
    sim = quantize(model, torch.randn(2, 3, 32, 32)).train()
    assert any(isinstance(m, (torchvision.ops.StochasticDepth, nn.Dropout)) and m.training for m in sim.modules())
    with bypassed(sim, weights=True), torch.no_grad():
        torch.manual_seed(1)
        ours = sim(X)
        torch.manual_seed(1)
        theirs = model(X)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_in_place_ops_keep_their_meaning():
    def forward(m, x):
        y = m.conv(x)
        z = F.relu(y, inplace=True)  # y is changed too
        y = y + z
        y += x
        w = y.mul_(2)
        return m.act(w) + w + y.clamp_(-1, 1)

    model = Net(forward, conv=nn.Conv2d(3, 3, 1), act=nn.ReLU(inplace=True)).eval()
    sim = quantize(model, X, QuantScheme(weight_bits=None, act_bits=None))
    with torch.no_grad():
        torch.testing.assert_close(sim(X.clone()), model(X.clone()))
    sim.train()(X).sum().backward()


def test_what_cannot_be_traced_names_module_line_and_way_out():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            if x.sum() > 0:
                return self.conv(x)
            return x

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Branch())
    with pytest.raises(UserError, match=r"module '2' \(Branch\)[\s\S]*if x.sum\(\) > 0[\s\S]*leaf_modules=\['2'\]"):
        quantize(model, X)
    sim = quantize(model, X, leaf_modules=["2"])
    assert ("2", "kept whole; its 1 conv or linear weights stay float") in sim_report(sim).unquantized
    assert list(weight_quantizers(quantize(model, X, leaf_modules=["Branch"]))) == ["0"]
    with pytest.raises(UserError, match="no module or class named layer9"):
        quantize(model, X, leaf_modules=["layer9"])


def test_a_graph_that_depends_on_the_batch_size_is_refused_by_name():
    def forward(m, x):
        y = m.conv(x)
        return m.bn(y.reshape(int(x.shape[0]) if isinstance(x.shape[0], int) else 4, 3, -1, 16))

    model = Net(forward, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    with pytest.raises(UserError, match="control flow depends on the batch size: 1, 2, 5"):
        quantize(model, X)


def test_models_with_optional_arguments_several_inputs_and_dict_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, a, b, mask=None, scale: float = 1.0):
            y = self.conv(a) + b * scale
            return {"out": y if mask is None else y * mask, "aux": y}

    sim = quantize(Two(), (X, X), QuantScheme(weight_bits=8, act_bits=8))
    calibrate(sim, [(X, X)], 1, lambda model, batch: model(*batch))
    assert set(sim(X, X)) == {"out", "aux"}


def test_weights_that_a_function_reads_are_named():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))

        def forward(self, x):
            return F.conv2d(x, self.weight)

    for scheme in (QuantScheme(), QuantScheme(act_bits=None)):
        reason = "a constant or parameter that the graph reads directly"
        assert ("weight", reason) in sim_report(quantize(Functional(), X, scheme)).unquantized


def test_first_last_bits_reach_the_last_layers_input_through_a_relu():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 5)
    )
    bits = [q.bits for q in activation_quantizers(quantize(model, X, QuantScheme(4, 4, first_last_bits=8))).values()]
    assert bits == [8, 4, 8, 8]


def test_identities_do_not_keep_a_group_apart():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU())
    assert list(placed(quantize(model, X)).values()) == [False, True]


def test_a_difference_behind_zeros_is_seen():
    def forward(m, x):
        y = m.conv(x)
        return m.head((y * 0.5 if m.training else y).mean((2, 3)))

    model = Net(forward, conv=nn.Conv2d(3, 3, 1), head=nn.Linear(3, 2))
    nn.init.zeros_(model.head.weight)
    assert sim_report(quantize(model, X)).modes == "both"


def test_defaults_of_every_kind_and_inputs_that_are_ignored():
    class Net2(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x, unused, dims=(2, 3), keep=False):
            return self.conv(x).mean(dims, keepdim=keep)

    sim = quantize(Net2(), (X, X), QuantScheme(act_bits=None))
    assert sim(X, X).shape == (4, 3)


def test_a_weight_with_a_parametrization_is_refused_by_name():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    with pytest.raises(UserError, match="The weight of 0 has a parametrization already"):
        quantize(model, X)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_a_weight_that_a_hook_computes_is_refused_by_name(name):
    model = nn.Sequential(getattr(nn.utils, name)(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    with pytest.raises(UserError, match=f"The weight of 0 is computed by torch.nn.utils.{name}.*remove_{name}"):
        quantize(model, X)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimator", ["mse", "minmax", "percentile"])
def test_a_weight_that_is_not_finite_is_refused_by_name(value, estimator):
    model = flat_cnn()
    model[3].weight.data[0, 0, 0, 0] = value
    with pytest.raises(UserError, match="the weight of 3 is not finite"):
        quantize(model, X, QuantScheme(weight_range=estimator))


class NoChannels(nn.Module):
    """As the decoders of Mix-Transformers join a tensor of no channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        nothing = torch.empty([x.shape[0], 0, x.shape[2], x.shape[3]], dtype=x.dtype, device=x.device)
        return self.bn(self.conv(torch.cat([x, nothing], 1)))


def test_a_tensor_without_elements_has_no_range_and_is_named():
    sim = quantize(NoChannels().eval(), X)
    calibrate(sim, [X], 1)
    assert list(placed(sim)) == ["x", "cat", "conv"]
    assert ("empty", "a tensor without elements") in sim_report(sim).unquantized
    assert bool(sim(X).isfinite().all())


def test_example_input_must_be_tensors():
    with pytest.raises(UserError, match="example_input"):
        quantize(flat_cnn(), [])
