"""Folding on the full grid of weights: exact for any sign of gamma, into files, too; what a sign that changes costs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from bnre_exp import (
    QuantScheme,
    bypassed,
    export_encodings,
    export_onnx,
    fold_batch_norms,
    integer_simulation,
    quantize,
    weight_quantizers,
)
from bnre_exp.algorithms.fold_loss import fold_loss
from bnre_exp.export.encodings import VERSIONS, read_encodings
from bnre_exp.onnx_io.session import feeds, open_session
from tests.export.saving import folded_network, round_trip
from tests.networks import BN, CONV, TRANSPOSED, flat_cnn, randomize

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def scheme(bits: int, grid: str = "full", **more) -> QuantScheme:
    return QuantScheme(**{"weight_bits": bits, "act_bits": None, "weight_grid": grid, **more})


def with_gammas(model: nn.Sequential, bn: int) -> nn.Sequential:
    """Gammas of every sign, zero included, and in each channel weights beyond both ends of any grid."""
    layer: nn.Module = randomize(model)[1 - bn]
    with torch.no_grad():
        count = model[bn].num_features
        model[bn].weight.copy_(torch.tensor([-1.5, 0.0, 0.5, -0.25, 2.0, -3.0, 1.0, -0.1])[:count])
        flat = layer.weight.transpose(0, 1) if isinstance(layer, tuple(TRANSPOSED.values())) else layer.weight
        flat[..., 0] = 9.0  # of each kernel, or feature
        flat[..., -1] = -9.0
    return model.double().eval()


LAYERS = {
    "conv": lambda: (nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
    "grouped": lambda: (nn.Conv1d(4, 8, 3, groups=2), nn.BatchNorm1d(8)),
    "depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)),
    "transposed": lambda: (nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm2d(8)),
    "transposed grouped": lambda: (nn.ConvTranspose3d(4, 8, 3, groups=2), nn.BatchNorm3d(8)),
    "linear": lambda: (nn.Linear(4, 8), nn.BatchNorm1d(8)),
    "before depthwise": lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4)),
}


def example(model: nn.Sequential) -> Tensor:
    dims = next(m.weight.dim() for m in model if not isinstance(m, nn.modules.batchnorm._BatchNorm)) - 2
    return torch.randn(5, 4, *(6,) * dims).double()


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_folding_is_exact_for_every_sign_and_codes_fit_into_their_bits(kind, bits):
    parts = LAYERS[kind]()
    layer, bn = (str(i) for i in ((1, 0) if kind == "before depthwise" else (0, 1)))
    model, end = with_gammas(nn.Sequential(*parts), int(bn)), 2 ** (bits - 1)
    sim = quantize(model, x := example(model), scheme(bits, weight_range="minmax"))
    quantizer = weight_quantizers(sim)[layer]
    quantizer.scale.mul_(0.4)  # both ends of every channel are clipped
    before = quantizer.codes(sim.get_submodule(layer).parametrizations.weight.original).int()
    gamma = model[int(bn)].weight.repeat_interleave(2) if kind == "before depthwise" else model[int(bn)].weight
    rows = quantizer.layout.rows(before)
    assert torch.equal(quantizer.mirrored, gamma < 0)
    assert bool((rows.amin(dim=1)[gamma < 0] == -end + 1).all()) and bool((rows.amax(dim=1)[gamma < 0] == end).all())
    assert bool((rows.amin(dim=1)[gamma >= 0] == -end).all()) and bool((rows.amax(dim=1)[gamma >= 0] == end - 1).all())
    folded, report = fold_batch_norms(sim)
    assert report.folded and report.lossy == () and report.notes == ()
    after = folded.get_submodule(layer).parametrizations.weight.original
    assert after.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert torch.equal(after.int(), before * quantizer.layout.expand(gamma.sign()).int())
    assert int(after.min()) == -end and int(after.max()) == end - 1
    expected, actual = sim(x), folded(x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("kind", [CONV, TRANSPOSED], ids=["conv", "transposed"])
@torch.no_grad()
def test_two_bits_give_four_levels_before_and_after(kind, dim):
    model = randomize(nn.Sequential(kind[dim](4, 8, 3), BN[dim](8))).eval()
    sim = quantize(model, torch.randn(3, 4, *(6,) * dim), scheme(2))
    assert sim.get_submodule("0").parametrizations.weight[0].codes(sim.get_submodule("0").weight).unique().tolist() == [
        -2, -1, 0, 1, 2,
    ]  # fmt: skip
    folded, _ = fold_batch_norms(sim)
    assert folded.get_submodule("0").parametrizations.weight.original.unique().tolist() == [-2, -1, 0, 1]


def flipped(sim: nn.Module, bn: str, channels: list[int]) -> nn.Module:
    """As if training had carried these gammas over zero."""
    with torch.no_grad():
        sim.get_submodule(bn).weight[channels] *= -1
    return sim


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_gamma_that_changed_its_sign_is_named_with_the_codes_that_it_costs(kind):
    parts, bits = LAYERS[kind](), 3
    layer, bn = ("1", "0") if kind == "before depthwise" else ("0", "1")
    model = with_gammas(nn.Sequential(*parts), int(bn))
    sim = quantize(model, x := example(model), scheme(bits, weight_range="minmax"))
    weight = sim.get_submodule(layer).parametrizations.weight
    weight[0].scale.mul_(0.4)
    flipped(sim, bn, [0, 2])  # from -1.5 and 0.5
    before, state = weight[0].codes(weight.original).int(), {k: v.clone() for k, v in sim.state_dict().items()}
    folded, report = fold_batch_norms(sim)
    assert all(torch.equal(value, state[key]) for key, value in sim.state_dict().items())
    gamma = sim.get_submodule(bn).weight
    gamma = gamma.repeat_interleave(2) if kind == "before depthwise" else gamma
    wanted = before * weight[0].layout.expand(gamma.sign()).int()
    after = folded.get_submodule(layer).parametrizations.weight.original.int()
    assert torch.equal(after, wanted.clamp(-4, 3)) and int((after != wanted).sum()) > 0
    channels = 4 if kind == "before depthwise" else 2
    reason = (
        f"gamma has changed its sign since quantize(): in {channels} channels, {int((after != wanted).sum())} codes"
    )
    assert report.lossy == ((layer, f"{reason} without counterpart clamped"),) and report.notes == ()
    assert folded.meta["fold_report"]["lossy"] == report.lossy
    # All of the loss: a simulation with the clamped weights is the folded network.
    low, high = (torch.where(weight[0].layout.expand(gamma) < 0, *ends) for ends in ((-3.0, -4.0), (4.0, 3.0)))
    scale = weight[0].layout.expand(weight[0].scale)
    weight.original.copy_(before.clamp(low, high) * scale)
    torch.testing.assert_close(folded(x), sim(x), rtol=1e-9, atol=1e-9 * float(sim(x).abs().max()))


@torch.no_grad()
def test_a_clamped_code_is_that_of_its_layer_alone_where_a_weight_is_shared():
    """Of two layers with one weight, gamma changed its sign behind the first."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[2].weight = model[0].weight
    model[0].weight.copy_(torch.tensor([[9.0, 1, -9], [9, 1, -9], [9, 1, -9]]).reshape(3, 3, 1, 1))
    for bn in (model[1], model[3]):
        bn.weight.copy_(torch.tensor([1.0, -1.0, 1.0]))
    sim = quantize(model.double().eval(), torch.randn(2, 3, 6, 6).double(), scheme(3, weight_range="minmax"))
    first, second = (sim.get_submodule(name).parametrizations.weight for name in ("0", "2"))
    assert first.original is second.original
    for weight in (first, second):
        weight[0].scale.mul_(0.4)
    flipped(sim, "1", [0, 1])
    expected = second[0].codes(second.original).int() * torch.tensor([1, -1, 1]).reshape(3, 1, 1, 1)
    folded, report = fold_batch_norms(sim)
    assert [layer for layer, _ in report.lossy] == ["0"] and "2 codes without counterpart" in report.lossy[0][1]
    assert torch.equal(folded.get_submodule("2").parametrizations.weight.original.int(), expected)


@torch.no_grad()
def test_what_a_change_of_sign_costs_is_told_also_where_no_bn_folds_any_more():
    model = with_gammas(nn.Sequential(*LAYERS["conv"]()), 1)
    sim = quantize(model, x := example(model), scheme(3, weight_range="minmax"))
    sim.get_submodule("0").parametrizations.weight[0].scale.mul_(0.4)
    assert fold_loss(sim) == ()
    weight = sim.get_submodule("0").weight.clone()
    sim.get_submodule("1").register_forward_hook(lambda module, inputs, output: None)
    (loss,) = fold_loss(sim)
    folded, report = fold_batch_norms(sim)
    assert report.folded == () and report.lossy == ((loss.layer, loss.reason),) and (loss.layer, loss.bn) == ("0", "")
    assert loss.reason.startswith("its BN is no longer folded: in 4 channels, ")
    difference = folded.get_submodule("0").weight - weight
    channels = difference.flatten(1).abs().amax(dim=1) > 0
    assert torch.equal(channels, model[1].weight < 0)  # those that are mirrored
    assert loss.error == pytest.approx(float(difference.norm() / weight.norm())) and loss.error > 0.01
    assert not torch.equal(folded(x), sim(x))
    codes = folded.get_submodule("0").parametrizations.weight.original
    assert (int(codes.min()), int(codes.max())) == (-4, 3)


@torch.no_grad()
def test_a_sign_that_changed_costs_nothing_where_no_code_is_at_the_end():
    model = randomize(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))).double().eval()
    sim = quantize(model, x := torch.randn(3, 4, 6, 6).double(), scheme(4))
    sim.get_submodule("0").parametrizations.weight[0].scale.mul_(3)
    folded, report = fold_batch_norms(flipped(sim, "1", [1]))
    text = "gamma has changed its sign since quantize(): in 1 channel, 0 codes without counterpart clamped"
    assert report.lossy == () and report.notes == (("0", text),)
    torch.testing.assert_close(folded(x), sim(x), rtol=1e-9, atol=1e-9 * float(sim(x).abs().max()))


@torch.no_grad()
def test_a_gamma_that_became_zero_costs_nothing_and_the_narrow_grid_fits_either_sign():
    model = with_gammas(nn.Sequential(*LAYERS["conv"]()), 1)
    for grid in ("full", "narrow"):
        sim = quantize(model, x := example(model), scheme(2, grid))
        sim.get_submodule("1").weight[[0, 2]] = 0.0
        if grid == "narrow":
            flipped(sim, "1", [3, 4])
        folded, report = fold_batch_norms(sim)
        assert report.lossy == () and report.notes == ()
        torch.testing.assert_close(folded(x), sim(x), rtol=1e-9, atol=1e-9 * float(sim(x).abs().max()))


@pytest.mark.parametrize("per_channel", [True, False])
@torch.no_grad()
def test_weights_that_are_quantized_anew_use_the_whole_grid(per_channel):
    model = randomize(flat_cnn()).eval()
    for bn in (model[1], model[4], model[7]):
        bn.weight.abs_()  # with one scale for weights of all signs and sizes, the best one may leave out an end
    sim = quantize(model, IMAGES, scheme(2, per_channel=per_channel))
    folded, report = fold_batch_norms(sim, "weight")
    why = "fold.mode=weight" if per_channel else "one scale for the whole tensor"
    assert report.lossy == tuple((name, f"weights quantized anew ({why})") for name in ("0", "3", "6"))
    codes = [folded.get_submodule(name).parametrizations.weight.original for name in ("0", "3", "6", "11")]
    assert all(code.unique().tolist() == [-2, -1, 0, 1] for code in codes)


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(8, 8), (4, 8), (2, 8), (3, 4)])
@torch.no_grad()
def test_integers_and_files_hold_the_lowest_code(weight_bits, act_bits, tmp_path):
    how = {"weight_bits": weight_bits, "act_bits": act_bits, "weight_grid": "full"}
    folded, end = folded_network(randomize(flat_cnn()), IMAGES, **how), 2 ** (weight_bits - 1)
    codes = folded.get_submodule("6").parametrizations.weight.original
    assert int(codes.min()) == -end and int(codes.max()) == end - 1
    loaded = round_trip(folded, tmp_path / "net", IMAGES)
    assert torch.equal(loaded.get_submodule("6").parametrizations.weight.original, codes)
    export_onnx(folded, IMAGES, tmp_path / "net.onnx")
    proto = onnx.load(tmp_path / "net.onnx")
    (stored,) = (tensor for tensor in proto.graph.initializer if tensor.name == "6.weight_codes")
    np.testing.assert_array_equal(numpy_helper.to_array(stored).astype(np.int8), codes.numpy())
    session, x = open_session(proto), torch.randn(64, 3, 16, 16)
    found = torch.from_numpy(session.run(None, feeds(session, x))[0])
    assert torch.equal(integer_simulation(folded)(x), found)
    export_encodings(folded, IMAGES, tmp_path / "encodings")
    for version in VERSIONS:
        (read,) = (p for p in read_encodings(tmp_path / "encodings", version).parameters if p.name == "6.weight")
        np.testing.assert_array_equal(read.codes, codes.numpy())


@torch.no_grad()
def test_the_function_of_a_network_stays_with_activations_bypassed():
    model = randomize(flat_cnn()).double().eval()
    sim = quantize(model, IMAGES.double(), scheme(2, act_bits=8))
    folded, report = fold_batch_norms(sim)
    assert len(report.folded) == 3 and report.lossy == ()
    with bypassed(sim), bypassed(folded):
        expected, actual = sim(IMAGES.double()), folded(IMAGES.double())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
