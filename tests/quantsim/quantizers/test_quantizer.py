"""Fake quantization, its gradients, and range estimation, against torch's own kernels and closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from bnre_exp import UserError
from bnre_exp.quantsim.quantizers.layout import layout_of
from bnre_exp.quantsim.quantizers.observer import RangeObserver
from bnre_exp.quantsim.quantizers.quantizer import (
    ActivationQuantizer,
    Dequantize,
    WeightQuantizer,
    fake_quantize,
    narrow_quant_max,
    positive,
)
from bnre_exp.quantsim.quantizers.ranges import affine_grid, fit_activation_range, fit_symmetric_scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_forward_and_gradients_equal_torchs_learnable_kernel(bits):
    x = (torch.randn(64, 8) * 3).requires_grad_()
    scale, zero = torch.tensor([0.13], requires_grad=True), torch.tensor([float(2 ** (bits - 1))], requires_grad=True)
    high = 2**bits - 1
    y = fake_quantize(x, scale, zero, 0, high, gradient_scale=0.25)
    # Beyond the last code, up to where values round to it, eq. 3 of the paper clips already; torch's kernel does not.
    position = (x / scale + zero).detach()
    beyond = (position - position.clamp(0, high)).abs()
    upstream = torch.randn_like(y) * ((beyond == 0) | (beyond > 0.5))
    y.backward(upstream)
    peer = [t.detach().clone().requires_grad_() for t in (x, scale, zero)]
    z = torch._fake_quantize_learnable_per_tensor_affine(*peer, 0, high, 0.25)
    z.backward(upstream)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip((x, scale, zero), peer):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_per_channel_gradients_equal_torchs_learnable_kernel():
    weight, scale = torch.randn(6, 4, 3, 3, requires_grad=True), torch.rand(6).add_(0.05).requires_grad_()
    y = fake_quantize(weight, scale.reshape(-1, 1, 1, 1), None, -7, 7, 0.5)
    beyond = ((weight / scale.reshape(-1, 1, 1, 1)).abs() - 7).detach()
    upstream = torch.randn_like(y) * ((beyond <= 0) | (beyond > 0.5))
    y.backward(upstream)
    peer = [t.detach().clone().requires_grad_() for t in (weight, scale)]
    z = torch._fake_quantize_learnable_per_channel_affine(*peer, torch.zeros(6), 0, -7, 7, 0.5)
    z.backward(upstream)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(weight.grad, peer[0].grad)
    torch.testing.assert_close(scale.grad, peer[1].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_of_the_input_is_kept_and_float64_is_not_rounded(dtype):
    x = torch.linspace(-1, 1, 101, dtype=dtype)
    y = fake_quantize(x, torch.tensor(0.01, dtype=torch.float64), None, -127, 127)
    assert y.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(y, (x / 0.01).round() * 0.01, rtol=1e-12, atol=0)


def test_a_scale_stays_positive_whatever_the_optimizer_does():
    scale = nn.Parameter(torch.tensor([0.1]))
    for value in (-0.3, 0.0, 1e-20):
        scale.data.fill_(value)
        used = positive(scale)
        assert float(used.detach()) > 0 and bool(used.isfinite())
    scale.data.fill_(1e-20)
    positive(scale).sum().backward()
    assert float(scale.grad) != 0  # not stuck there


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 3), (4, 7), (8, 127), (16, 32767)])
def test_narrow_range(bits, largest):
    assert narrow_quant_max(bits) == largest
    conv = nn.Conv2d(2, 3, 3)
    quantizer = WeightQuantizer(bits, layout_of(conv), torch.full((3,), 1e-4), learned=False)
    codes = quantizer.codes(torch.tensor([-9.0, 9.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 2, 3, 3))
    assert (int(codes.min()), int(codes.max())) == (-largest, largest)
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)


def test_grouped_transposed_conv_has_a_scale_per_group_and_output_channel():
    conv = nn.ConvTranspose2d(6, 8, 2, groups=2, bias=False)
    layout = layout_of(conv)
    rows = layout.rows(conv.weight)
    assert rows.shape == (8, 3 * 4)
    for channel in range(8):  # silencing a row silences that output channel, and no other
        probe = copy.deepcopy(conv)
        mask = torch.ones(8).index_fill(0, torch.tensor([channel]), 0)
        with torch.no_grad():
            probe.weight.mul_(layout.expand(mask))
            out = probe(torch.randn(1, 6, 4, 4)).abs().sum(dim=(0, 2, 3))
        assert out[channel] == 0 and bool((out[mask.bool()] > 0).all())
        assert torch.equal(layout.rows(probe.weight)[channel], torch.zeros(12))


@pytest.mark.parametrize("quant_max", [1, 3, 7, 127])
def test_mse_scale_is_as_good_as_an_exhaustive_search(quant_max):
    rows = torch.randn(5, 400) * torch.tensor([[0.01], [1.0], [3.0], [1.0], [20.0]])
    rows[3, 0] = 40.0  # an outlier

    def error(scale):
        return ((rows / scale[:, None]).round().clamp(-quant_max, quant_max) * scale[:, None] - rows).square().sum(1)

    ours = error(fit_symmetric_scale(rows, quant_max, "mse"))
    top = rows.abs().amax(1) / quant_max
    best = torch.stack([error(top * fraction) for fraction in torch.linspace(0.01, 1.2, 1000)]).amin(0)
    assert bool((ours <= best * (1.05 if quant_max < 100 else 1.15)).all())


def test_minmax_percentile_and_dead_rows():
    rows = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(fit_symmetric_scale(rows, 7, "minmax"), torch.tensor([2 / 7, 2 / 7]))
    torch.testing.assert_close(fit_symmetric_scale(torch.zeros(2, 3), 7, "mse"), torch.tensor([1 / 7, 1 / 7]))
    outlier = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([100.0])]).reshape(1, -1)
    assert float(fit_symmetric_scale(outlier, 1, "percentile", 99.9)) == pytest.approx(1.0)
    for estimator in ("mse", "minmax", "percentile"):
        assert bool((fit_symmetric_scale(rows, 7, estimator) > 1e-3).all())


@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.1), (-3.0, 0.0), (0.0, 5.0), (-1e-3, 4.0)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_real_zero_is_exact_on_every_activation_grid(low, high, bits):
    scale, zero_point = affine_grid(low, high, bits)
    assert 0 <= zero_point <= 2**bits - 1 and isinstance(zero_point, int)
    quantizer = ActivationQuantizer(bits, unsigned=False, learned=True)
    quantizer.set_range(low, high)
    assert float(quantizer(torch.zeros(3)).detach().abs().max()) == 0
    x = torch.linspace(low, high, 1000)
    assert float((quantizer(x) - x).detach().abs().max()) <= scale * 1.01
    assert len(quantizer(x).unique()) <= 2**bits


def test_activation_range_estimators():
    values = torch.randn(20000)
    values[0] = 30.0
    low, high = fit_activation_range(values, float(values.min()), 30.0, 8, unsigned=False, estimator="minmax")
    assert high == 30.0
    mse = fit_activation_range(values, low, high, 4, unsigned=False, estimator="mse")
    assert -5 < mse[0] < -1.5 and 1.5 < mse[1] < 5
    percentile = fit_activation_range(values, low, high, 8, False, "percentile", 99.0)
    assert percentile[1] == pytest.approx(float(values.quantile(0.99)), abs=0.02)
    assert percentile[0] == pytest.approx(float(values.quantile(0.01)), abs=0.02)
    assert fit_activation_range(values.abs(), 0.0, 30.0, 4, unsigned=True)[0] == 0
    assert fit_activation_range(torch.zeros(9), 0.0, 0.0, 8, unsigned=True) == (0.0, 1.0)


def test_observer_sees_every_extreme_and_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    observer = RangeObserver(num_batches=4)
    for batch in range(4):
        x = torch.zeros(100_000)
        x[batch] = 5.0 + batch
        observer.observe(x)
    assert observer.high == 8.0 and sum(len(s) for s in observer.samples) <= 2**17
    assert torch.equal(torch.get_rng_state(), state)


def test_uncalibrated_and_not_finite_are_errors():
    quantizer = ActivationQuantizer(8, unsigned=False, learned=False, label="layer3.conv")
    with pytest.raises(UserError, match="layer3.conv has no range yet"):
        quantizer(torch.ones(2))
    observer = RangeObserver(1)
    observer.observe(torch.tensor([1.0, math.nan]))
    with pytest.raises(UserError, match="layer3.conv are not finite"):
        observer.fit(quantizer, "mse", 99.9)


@pytest.mark.parametrize("factor", [2.0**70, 2.0**-80, 2.0**25])
def test_the_best_range_does_not_depend_on_the_unit(factor):
    """Squared errors of such values overflow or vanish in float32, all candidates were equal, and the first won."""
    values, rows = torch.randn(5000), torch.randn(3, 100)
    low, high = fit_activation_range(values, float(values.min()), float(values.max()), 4, unsigned=False)
    scaled = fit_activation_range(values * factor, float(values.min()) * factor, float(values.max()) * factor, 4, False)
    assert scaled == (low * factor, high * factor)
    mixed = torch.cat([rows[:1], rows[1:] * factor])
    expected = fit_symmetric_scale(rows, 7) * torch.tensor([1, factor, factor])
    assert torch.equal(fit_symmetric_scale(mixed, 7), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_weight_gets_the_scale_of_its_values(dtype):
    rows = (torch.randn(4, 200) * 1e-3).to(dtype)
    assert torch.equal(fit_symmetric_scale(rows, 7), fit_symmetric_scale(rows.float(), 7).to(dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_range_is_fitted_to_what_is_not_finite(value):
    rows = torch.tensor([[1.0, 2.0], [value, 1.0]])
    for estimator in ("mse", "minmax", "percentile"):
        with pytest.raises(UserError, match="not finite"):
            fit_symmetric_scale(rows, 7, estimator)
    with pytest.raises(UserError, match="not finite"):
        fit_activation_range(torch.ones(3), 0.0, value, 8, unsigned=False)


def test_an_observer_keeps_a_nan_in_mind_whatever_comes_later_and_takes_no_elements():
    observer = RangeObserver(2)
    observer.observe(torch.tensor([1.0, math.nan, 3.0]))
    observer.observe(torch.ones(3))
    assert not observer.is_finite
    empty = RangeObserver(1)
    quantizer = ActivationQuantizer(8, unsigned=False, learned=False, label="roi")
    with pytest.raises(UserError, match="roi was never computed"):
        empty.fit(quantizer, "mse", 99.9)
    empty.observe(torch.zeros(0, 4))
    assert empty.fit(quantizer, "mse", 99.9) == (0.0, 1.0)


def test_a_range_survives_a_state_dict():
    quantizer = ActivationQuantizer(8, unsigned=False, learned=True)
    quantizer.set_range(-1, 3)
    other = ActivationQuantizer(8, unsigned=False, learned=True)
    other.load_state_dict(quantizer.state_dict())
    x = torch.randn(100)
    assert torch.equal(other(x), quantizer(x))


def test_lsq_scale_gradient_is_scaled_per_channel():
    conv = nn.Conv2d(4, 6, 3)
    quantizer = WeightQuantizer(4, layout_of(conv), torch.full((6,), 0.03), learned=True)
    quantizer(conv.weight).sum().backward()
    plain = torch.full((6,), 0.03, requires_grad=True)
    fake_quantize(conv.weight, plain.reshape(-1, 1, 1, 1), None, -7, 7).sum().backward()
    torch.testing.assert_close(quantizer.scale.grad, plain.grad / math.sqrt(4 * 9 * 7))


def test_dequantize_is_codes_times_scale():
    codes = torch.randint(-7, 8, (3, 2, 3, 3), dtype=torch.int8)
    scale = torch.rand(3)
    dequantize = Dequantize(4, 4, False, 1, 2, scale)
    assert torch.equal(dequantize(codes), codes.float() * scale.reshape(-1, 1, 1, 1))
