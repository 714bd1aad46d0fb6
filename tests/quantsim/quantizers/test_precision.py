"""Codes and scales in float32 or float64, whatever type a network is cast to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bnre_exp import (
    QuantScheme,
    UserError,
    activation_quantizers,
    calibrate,
    fold_batch_norms,
    integer_simulation,
    load_folded,
    quantize,
    quantize_biases,
    save_folded,
    weight_quantizers,
)
from bnre_exp.quantsim.quantizers.quantizer import Dequantize
from tests.export.saving import folded_network
from tests.networks import flat_cnn, randomize

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
# Of the largest output: two dozen roundings of half precision's own, and values that they put on the next code.
WITHIN = {torch.float16: 0.02, torch.bfloat16: 0.06, torch.float64: 1e-6}
every_dtype = pytest.mark.parametrize("dtype", WITHIN, ids=["float16", "bfloat16", "float64"])


def network(beta: float = 3.0) -> nn.Module:
    """Biases that are far more than 65504 of their steps."""
    model = randomize(flat_cnn()).eval()
    for bn in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.constant_(bn.bias, beta)
    return model


def simulation() -> nn.Module:
    sim = quantize(network(), X, QuantScheme(weight_bits=8, act_bits=8))
    calibrate(sim, [X], 1)
    return sim


def run(model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        y = model(X.to(dtype))
    assert y.dtype == dtype
    return y.double()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert float((actual - expected).abs().max()) <= WITHIN[dtype] * float(expected.abs().max())


@every_dtype
def test_a_folded_network_in_another_type(dtype):
    folded = folded_network(network(), X, weight_bits=8)
    expected, before = run(folded, torch.float32), copy.deepcopy(folded.state_dict())
    cast = copy.deepcopy(folded).to(dtype)
    assert_close(run(cast, dtype), expected, dtype)
    for name, layer in cast.named_modules():
        if hasattr(layer, "parametrizations"):
            assert layer.weight.dtype == layer.bias.dtype == dtype
            torch.testing.assert_close(layer.bias.float(), folded.get_submodule(name).bias, rtol=1e-2, atol=1e-6)
    again = cast.float()
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    assert torch.equal(run(again, torch.float32), expected)


@every_dtype
def test_a_simulation_that_is_cast_folds_to_the_same_function(dtype):
    sim = simulation()
    expected = run(sim, torch.float32)
    sim.to(dtype)
    folded, _ = fold_batch_norms(sim)
    assert_close(run(folded, dtype), expected, dtype)
    quantize_biases(folded)
    assert_close(run(folded, dtype), expected, dtype)
    assert_close(run(integer_simulation(folded), dtype), expected, dtype)


def test_a_scale_that_half_precision_does_not_hold_survives_it():
    sim = simulation()
    tiny = [*weight_quantizers(sim).values(), *activation_quantizers(sim).values()]
    with torch.no_grad():
        for quantizer in tiny:
            quantizer.scale.fill_(1e-9)
    weight = sim.get_submodule("0").parametrizations.weight
    codes = weight[0].codes(weight.original)
    sim.half()
    assert all(quantizer.scale.dtype == torch.float32 and bool((quantizer.scale == 1e-9).all()) for quantizer in tiny)
    assert torch.equal(weight[0].codes(weight.original), codes)
    assert all(quantizer.zero_point.dtype == torch.float32 for quantizer in activation_quantizers(sim).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_times_scale_are_computed_in_float32(dtype):
    codes, scale = torch.tensor([2**31 - 1, 70000, -3], dtype=torch.int32), torch.full((3,), 1e-9)
    expected = (codes.double() * 1e-9).to(dtype)
    assert torch.equal(Dequantize(32, 1, False, 1, 1, scale).to(dtype)(codes), expected)
    assert torch.equal(Dequantize(32, 1, False, 1, 1, scale, dtype=dtype)(codes), expected)
    stored = Dequantize(32, 1, False, 1, 1, torch.full((3,), 1e-5, dtype=dtype))  # by a version before
    assert bool(stored(codes).isfinite().all()) and stored(codes).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_of_a_network_in_half_precision(dtype, tmp_path):
    folded = folded_network(network(), X, weight_bits=4).to(dtype)
    save_folded(folded, tmp_path / "net")
    loaded = load_folded(tmp_path / "net")
    assert torch.equal(run(loaded, dtype), run(folded, dtype))
    assert torch.equal(run(loaded.float(), torch.float32), run(folded.float(), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_not_quantized(dtype):
    with pytest.raises(UserError, match=r"0.weight is b?float16.*give model.float\(\).*precision=bfloat16"):
        quantize(network().to(dtype), X.to(dtype))
    mixed = network()
    mixed[4].to(dtype)
    with pytest.raises(UserError, match="4.weight is"):
        quantize(mixed, X)


def test_scales_are_in_float32_whatever_the_default_type_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        sim = quantize(network().float(), X, QuantScheme(weight_bits=8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(quantizer.scale.dtype == torch.float32 for quantizer in activation_quantizers(sim).values())


def test_a_table_in_half_precision_is_no_network_in_half_precision():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.register_buffer("table", torch.zeros(3, dtype=torch.bfloat16))
    quantize(model, torch.randn(2, 3, 4, 4))
