"""Grids of weights at insertion: which channels are mirrored, what the full grid computes, and what is noted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnre_exp import LayerRule, QuantScheme, UserError, calibrate, list_layers, quantize, weight_quantizers
from bnre_exp.quantsim.insert import quantize_again, rebuild_sim
from bnre_exp.quantsim.quantizers.layout import layout_of
from bnre_exp.quantsim.quantizers.quantizer import WeightQuantizer
from bnre_exp.quantsim.quantizers.ranges import fit_symmetric_scale
from bnre_exp.quantsim.sim import sim_report
from bnre_exp.report.layers import layers_columns
from tests.networks import Net, flat_cnn, randomize

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FULL = QuantScheme(weight_bits=2, act_bits=None, weight_grid="full")


def codes(sim: nn.Module, name: str) -> Tensor:
    weight = sim.get_submodule(name).parametrizations.weight
    return weight[0].codes(weight.original)


def test_a_channel_is_mirrored_where_the_gamma_that_folds_is_negative():
    model = randomize(flat_cnn())
    quantizers = weight_quantizers(quantize(model, X, FULL))
    for layer, bn in (("0", 1), ("3", 4), ("6", 7)):
        assert torch.equal(quantizers[layer].mirrored, model[bn].weight < 0) and quantizers[layer].mirrored.any()
    assert not quantizers["11"].mirrored.any() and quantizers["11"].full_grid
    narrow = quantize(model, X, replace(FULL, weight_grid="narrow"))
    assert not any(quantizer.full_grid for quantizer in weight_quantizers(narrow).values())


def test_a_bn_that_does_not_fold_mirrors_nothing():
    layers = {"conv": nn.Conv2d(3, 8, 3, padding=1), "bn": nn.BatchNorm2d(8)}
    model = randomize(Net(lambda m, x: m.bn(y := m.conv(x)) + y, **layers))
    quantizer = weight_quantizers(quantize(model, X, FULL))["conv"]
    assert quantizer.full_grid and not quantizer.mirrored.any()


def test_a_bn_before_a_depthwise_conv_mirrors_all_that_its_channel_meets():
    model = randomize(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, groups=3)))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-1.0, 0.5, -2.0]))
    mirrored = weight_quantizers(quantize(model, X, FULL))["1"].mirrored
    assert mirrored.tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("estimator", ["mse", "minmax", "percentile"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_a_mirrored_channel_is_the_negative_of_the_negated_one(bits, estimator):
    """So that folding, which changes the sign, gives the codes that gamma > 0 would have had for the other weights."""
    conv = nn.Conv2d(3, 8, 3, bias=False)
    model, negated = (nn.Sequential(conv, nn.BatchNorm2d(8)) for _ in range(2))
    negated[0] = nn.Conv2d(3, 8, 3, bias=False)
    with torch.no_grad():
        negated[0].weight.copy_(-conv.weight)
        negated[1].weight.fill_(-1.0)
    scheme = replace(FULL, weight_bits=bits, weight_range=estimator)
    plain, mirrored = quantize(model, X, scheme), quantize(negated, X, scheme)
    assert torch.equal(codes(plain, "0").int(), -codes(mirrored, "0").int())
    assert torch.equal(plain.get_submodule("0").weight, -mirrored.get_submodule("0").weight)
    assert int(codes(plain, "0").min()) == -(2 ** (bits - 1)) or estimator != "mse"


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_codes_reach_both_ends_and_their_type_holds_them(bits):
    layer, end = nn.Linear(3, 2), 2 ** (bits - 1)
    zero_point = torch.tensor([0.0, -1.0])
    quantizer = WeightQuantizer(bits, layout_of(layer), torch.ones(2), learned=False, zero_point=zero_point)
    weight = torch.tensor([[-1e6, 1e6, 0.0], [-1e6, 1e6, 0.0]])
    assert quantizer.codes(weight).tolist() == [[-end, end - 1, 0], [-end + 1, end, 0]]
    assert torch.equal(quantizer(weight), quantizer.codes(weight).float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_gradients_are_those_of_lsq_on_the_channels_own_range(bits, per_channel):
    """Eq. 3 of Esser et al. with autograd: inside the range rounding passes the gradient, outside a code is its end."""
    conv = nn.Conv2d(4, 6, 3).double()
    count = 6 if per_channel else 1
    scale = (torch.rand(count, dtype=torch.float64) + 0.3) * 0.2 / 2 ** (bits - 1)
    zero_point = torch.tensor([0.0, -1.0] * 3 if per_channel else [0.0])
    quantizer = WeightQuantizer(bits, layout_of(conv), scale, True, per_channel, zero_point)
    low = (-(2 ** (bits - 1)) - zero_point.double()).reshape(-1, 1, 1, 1)
    high = low + 2**bits - 1
    upstream = torch.randn_like(conv.weight)
    weight = conv.weight.detach().clone().requires_grad_()
    quantizer(weight).backward(upstream)

    reference, step = conv.weight.detach().clone().requires_grad_(), scale.clone().requires_grad_()
    position = reference / step.reshape(-1, 1, 1, 1)
    passed = position + (position.round() - position).detach()
    inside = (position >= low) & (position <= high)
    expected = torch.where(inside, passed, position.detach().clamp(low, high)) * step.reshape(-1, 1, 1, 1)
    expected.backward(upstream)
    assert bool((position < low).any()) and bool((position > high).any()) and bool(inside.any())
    torch.testing.assert_close(quantizer(conv.weight), expected)
    torch.testing.assert_close(weight.grad, reference.grad)
    factor = 1 / math.sqrt(conv.weight.numel() / count * (2 ** (bits - 1) - 1))
    torch.testing.assert_close(quantizer.scale.grad, step.grad * factor)
    assert quantizer.zero_point.grad is None


def test_training_learns_scales_and_keeps_the_grids():
    sim = quantize(randomize(flat_cnn()).train(), X, replace(FULL, weight_bits=3, act_bits=8))
    calibrate(sim, [X], 1)
    before = {name: (q.scale.detach().clone(), q.zero_point.clone()) for name, q in weight_quantizers(sim).items()}
    optimizer = torch.optim.SGD(sim.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        sim(X).square().mean().backward()
        optimizer.step()
    for name, (scale, zero_point) in before.items():
        quantizer = weight_quantizers(sim)[name]
        assert torch.equal(quantizer.zero_point, zero_point) and not torch.equal(quantizer.scale, scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_mse_range_of_the_full_grid_is_that_of_a_search_over_all_and_better_than_the_narrow_one(bits):
    rows = torch.randn(40, 300, generator=torch.Generator().manual_seed(bits))
    rows = (rows + torch.linspace(-1, 1, 40)[:, None]) * torch.logspace(-3, 2, 40)[:, None]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def error(scale: Tensor, low: int = low) -> Tensor:
        return ((rows / scale[:, None]).round().clamp(low, high) * scale[:, None] - rows).square().sum(dim=1)

    found = error(fit_symmetric_scale(rows, high, quant_min=low))
    top = torch.maximum(rows.amax(dim=1) / high, rows.amin(dim=1) / low)
    best = torch.stack([error(top * part) for part in torch.linspace(0.005, 1.5, 3000)]).amin(dim=0)
    assert bool((found <= best * 1.05).all()) and float((found / best).mean()) <= 1.005
    narrow = error(fit_symmetric_scale(rows, high), -high)
    assert bool((found <= narrow * 1.001).all()) and float((found / narrow).mean()) < 0.97


def test_minmax_and_percentile_cover_what_the_full_grid_can():
    rows = torch.tensor([[0.3, -2.0, 0.1], [2.0, -0.5, 0.1], [0.0, 0.0, 0.0]])
    scale = fit_symmetric_scale(rows, 1, "minmax", quant_min=-2)
    assert scale.tolist() == [1.0, 2.0, 2.0]  # -2 is code -2; 2 is code 1; zeros get the largest
    outliers = torch.cat([torch.linspace(-1, 0.5, 998), torch.tensor([-90.0, 70.0])]).reshape(1, -1)
    assert float(fit_symmetric_scale(outliers, 1, "percentile", 99.8, quant_min=-2)) == 0.5


def test_one_scale_for_the_tensor_is_on_the_full_grid_whatever_the_gammas():
    for gamma in (None, -1.0, 1.0):
        model = randomize(flat_cnn())
        if gamma is not None:
            nn.init.constant_(model[1].weight, gamma)
        sim = quantize(model, X, replace(FULL, per_channel=False))
        assert all(q.full_grid and not q.mirrored.any() for q in weight_quantizers(sim).values())
        assert codes(sim, "6").unique().tolist() == [-2, -1, 0, 1] and sim_report(sim).weight_notes == ()


def vanishing() -> nn.Module:
    """In the first two layers one value stands out, so that minmax at 2 bits rounds the others to zero."""
    model = randomize(flat_cnn())
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.flatten(1)[:, 0] = 9.0
    return model


def test_weights_that_are_mostly_rounded_to_zero_are_noted_once():
    scheme = QuantScheme(weight_bits=2, act_bits=None, weight_range="minmax")
    others = (LayerRule("[61]*", weight_bits=8),)
    (note,) = sim_report(quantize(vanishing(), X, replace(scheme, overrides=others))).weight_notes
    assert note == (
        "more than half of the weights are rounded to zero in 2 layers (0, 3) with weight_range=minmax; "
        "weight_range=mse rounds fewer"
    )  # fmt: skip
    assert sim_report(quantize(vanishing(), X, replace(scheme, weight_bits=8))).weight_notes == ()
    pruned = randomize(flat_cnn())
    with torch.no_grad():  # zeros that were there are no loss
        pruned[0].weight.copy_(pruned[0].weight * (torch.rand(pruned[0].weight.shape) < 0.2))
    assert sim_report(quantize(pruned, X, replace(scheme, weight_bits=8))).weight_notes == ()


def test_notes_are_about_the_weights_that_were_given():
    """A network that is traced before its training is taken again with its weights."""
    scheme = QuantScheme(weight_bits=2, act_bits=None, weight_range="minmax")
    before = sim_report(quantize(vanishing(), X, scheme))
    assert before.weight_notes
    after = sim_report(quantize_again(randomize(flat_cnn()), X, replace(scheme, weight_bits=8), before))
    assert after.weight_notes == () and after.notes == before.notes
    assert sim_report(rebuild_sim(vanishing(), X, scheme)).weight_notes == ()


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("factor", [-1.0, 0.0], ids=["of the other sign", "as before training"])
def test_a_rebuilt_simulation_has_the_grids_of_the_state_and_not_of_the_gammas(factor, per_channel):
    model, others, scheme = randomize(flat_cnn()), randomize(flat_cnn()), replace(FULL, per_channel=per_channel)
    with torch.no_grad():
        for bn in (others[1], others[4], others[7]):
            bn.weight.mul_(factor).add_(1.0 + factor)  # all 1 where a network is rebuilt that was never trained
    sim = quantize(model, X, scheme)
    other = rebuild_sim(others, X, scheme)
    is_same = torch.equal(weight_quantizers(other)["0"].mirrored, weight_quantizers(sim)["0"].mirrored)
    assert is_same != per_channel
    other.load_state_dict(sim.state_dict())
    assert torch.equal(other.eval()(X), sim.eval()(X))
    assert torch.equal(weight_quantizers(other)["0"].mirrored, weight_quantizers(sim)["0"].mirrored)


def test_states_of_the_two_grids_are_told_apart_and_older_ones_are_narrow():
    narrow = quantize(randomize(flat_cnn()), X, replace(FULL, weight_grid="narrow"))
    full, key = quantize(randomize(flat_cnn()), X, FULL), "0.parametrizations.weight.0._extra_state"
    for network, state in ((full, narrow.state_dict()), (narrow, full.state_dict())):
        with pytest.raises(UserError, match="full_grid=.*and has .*full_grid="):
            network.load_state_dict(state)
    older = {name: x[:3] if name.endswith("weight.0._extra_state") else x for name, x in narrow.state_dict().items()}
    assert older[key].tolist() == [2, 1, 1]
    quantize(randomize(flat_cnn(), seed=1), X, replace(FULL, weight_grid="narrow")).load_state_dict(older)
    with pytest.raises(UserError, match="full_grid=False.*full_grid=True"):
        full.load_state_dict(older)


@pytest.mark.parametrize("error", [-1e-3, 1e-3])
@torch.no_grad()
def test_an_average_of_states_is_on_the_same_grid(error):
    """As EMA makes it: the zero points of channels are then no integers."""
    sim, other = (quantize(randomize(flat_cnn()), X, FULL) for _ in range(2))
    average = {key: x * (1 + error) if key.endswith("zero_point") else x for key, x in sim.state_dict().items()}
    other.load_state_dict(average)
    assert torch.equal(weight_quantizers(other)["0"].mirrored, weight_quantizers(sim)["0"].mirrored)
    assert torch.equal(codes(other, "0"), codes(sim, "0")) and int(codes(other, "0").max()) == 2
    assert torch.equal(other.get_submodule("0").weight, sim.get_submodule("0").weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_keeps_the_grid(dtype):
    sim = quantize(randomize(flat_cnn()), X, replace(FULL, weight_bits=8))
    before = codes(sim, "0")
    sim.to(dtype)
    assert weight_quantizers(sim)["0"].zero_point.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    after = codes(sim, "0")
    assert after.dtype == before.dtype and (after.int().max(), after.int().min()) == (128, -128)


def test_the_table_of_layers_names_the_grid():
    rows = {row.name: row for row in list_layers(quantize(randomize(flat_cnn()), X, FULL))}
    assert (rows["0"].weight_grid, rows["0"].mirrored, rows["11"].mirrored) == ("full", 4, 0)
    columns = layers_columns(list(rows.values()))
    texts = dict(zip(columns["layer"], columns["weight"]))
    assert texts["0"] == "2 bits, 8 channels, full grid, 4 mirrored" and texts["11"] == "2 bits, 10 channels, full grid"
    narrow = list_layers(quantize(randomize(flat_cnn()), X, replace(FULL, weight_grid="narrow")))
    assert {row.weight_grid for row in narrow} == {"narrow", None}
    assert "2 bits, 8 channels" in layers_columns(narrow)["weight"]


def test_an_unknown_grid_is_refused():
    with pytest.raises(UserError, match="weight_grid='wide': expected narrow or full"):
        QuantScheme(weight_grid="wide")


def test_a_layer_that_is_called_twice_is_on_one_grid():
    conv, bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    model = randomize(Net(lambda m, x: m.bn(m.conv(m.bn(m.conv(x)))), conv=conv, bn=bn))
    sim = quantize(model, X, FULL)
    assert parametrize.is_parametrized(sim.conv, "weight") and len(sim.conv.parametrizations.weight) == 1
    assert torch.equal(weight_quantizers(sim)["conv"].mirrored, bn.weight < 0)
