"""Fake quantization of a tensor against its formulas: values, gradients, ties, memory layouts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bnre_exp.quantsim.quantizers.fake_quantize import fake_quantize


def reference(x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int, relu_end: float | None = None):
    """The formula, differentiable by autograd in all of its parts (LSQ eq. 3, LSQ+ for the zero point)."""
    x = x if relu_end is None else torch.nn.functional.hardtanh(x, 0.0, min(relu_end, 1e30))
    z = torch.zeros_like(scale) if zero is None else zero + (zero.round() - zero).detach()
    position = x / scale + z
    inside = ((position >= low) & (position <= high)).detach()
    codes = ((x / scale).round() + z).clamp(low, high)
    clipped = position.detach().clamp(low, high)
    # Inside the gradient passes rounding; outside the code is one of the ends.
    passed = torch.where(inside, position + (codes - position).detach(), clipped)
    return (passed - z) * scale


def gradients(function, tensors, upstream, *others, **more):
    given = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(*given, *others, **more)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), *(t.grad for t in given if t is not None)]


def values(shape=(16, 6, 5, 5), dtype=torch.float64) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64) * 3
    x.view(-1)[:20:2] = 0.0  # as a ReLU leaves many
    return x.to(dtype)


@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("kind", ["unsigned", "asymmetric", "per_channel", "relu", "relu6 first", "grid before relu6"])
def test_gradients_are_those_of_the_formula(bits, kind):
    high, x = 2**bits - 1, values()
    low, zero, relu_end = 0, None, None
    end = {"relu6 first": 7.0, "grid before relu6": 4.0}.get(kind, 5.0)
    scale = torch.tensor([end / high], dtype=torch.float64)
    if kind == "unsigned":
        x = x.abs()
    elif kind == "asymmetric":
        zero = torch.tensor([high * 0.4 + 0.3], dtype=torch.float64)
    elif kind == "per_channel":
        high = 2 ** (bits - 1) - 1
        low, scale = -high, (torch.rand(16, 1, 1, 1, dtype=torch.float64) + 0.5) * 3 / high
    else:
        relu_end = math.inf if kind == "relu" else 6.0
    upstream = torch.randn_like(x)
    expected = gradients(reference, (x, scale, zero), upstream, low, high, relu_end)
    found = gradients(fake_quantize, (x, scale, zero), upstream, low, high, relu_end=relu_end)
    assert len(found) == (4 if zero is not None else 3)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_scales_gradient_in_float32_is_as_good_as_rounding_allows(bits, mean):
    high = 2**bits - 1
    x, upstream = values((8, 32, 32, 32)).abs(), torch.randn(8, 32, 32, 32, dtype=torch.float64) + mean
    scale = torch.tensor([8.0 / high], dtype=torch.float64)
    _, grad_x, exact = gradients(fake_quantize, (x, scale, None), upstream, 0, high)
    _, grad_x32, found = gradients(fake_quantize, (x.float(), scale.float(), None), upstream.float(), 0, high)
    assert torch.equal(grad_x32 != 0, grad_x != 0)
    # What rounding x / scale to float32 alone does to slopes, which are half a step large.
    possible = float(upstream.abs().sum()) * high * 1e-7
    assert abs(float(found) - float(exact)) <= max(2e-6 * possible, 1e-3 * abs(float(exact)))


def test_ends_of_the_range_are_inside_but_zero_after_a_relu_is_not():
    scale = torch.tensor([0.1])
    x = torch.tensor([-0.1, 0.0, 0.75, 1.5, 1.6])  # 15 codes of 0.1
    ones = torch.ones(5)
    assert gradients(fake_quantize, (x, scale, None), ones, 0, 15)[1].tolist() == [0, 1, 1, 1, 0]
    after = gradients(fake_quantize, (x, scale, None), ones, 0, 15, relu_end=math.inf)[1]
    assert after.tolist() == [0, 0, 1, 1, 0]
    weight = torch.tensor([[-0.7, 0.7, 0.71, -0.71], [-1.4, 1.4, 0.0, 1.5]])
    scales = torch.tensor([[0.1], [0.2]])
    assert gradients(fake_quantize, (weight, scales, None), torch.ones(2, 4), -7, 7)[1].tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
    ]


def test_what_relu6_clips_to_the_end_of_the_grid_moves_the_scale_as_a_value_inside():
    scale, x = torch.tensor([6.0 / 255]), torch.tensor([7.0, 9.0, 3.0])
    for relu_end in (6.0, None):
        given = x if relu_end else x.clamp(0, 6)
        y, grad_x, grad_scale = gradients(fake_quantize, (given, scale, None), torch.ones(3), 0, 255, relu_end=relu_end)
        assert float(grad_scale.abs()) < 1 and float(y[0]) == pytest.approx(6.0)
        assert grad_x.tolist() == ([0, 0, 1] if relu_end else [1, 1, 1])


LAYOUTS = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "with gaps": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_gradient", [*LAYOUTS, "sum"])
def test_any_layout_in_memory_gives_the_same(layout, of_gradient):
    x = LAYOUTS[layout](values((4, 3, 6, 5)))
    scale = torch.tensor([0.3], dtype=torch.float64)
    upstream = torch.ones((), dtype=torch.float64).expand_as(x)
    if of_gradient != "sum" and x.numel():
        upstream = LAYOUTS[of_gradient](torch.randn(4, 3, 6, 5, dtype=torch.float64))
        upstream = upstream if upstream.shape == x.shape else torch.randn_like(x)
    found = gradients(fake_quantize, (x, scale, None), upstream, 0, 15)
    dense = gradients(fake_quantize, (x.contiguous(), scale, None), upstream.contiguous(), 0, 15)
    for ours, theirs in zip(found, dense):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("relu_end", [None, math.inf, 6.0])
@pytest.mark.parametrize("end", [4.0, 9.0])
def test_in_place_is_the_same_bit_for_bit(dtype, relu_end, end):
    x, scale = values(dtype=dtype), torch.tensor([end / 255])
    zero = None if relu_end is not None else torch.tensor([100.0])
    with torch.no_grad():
        expected = fake_quantize(x.clone(), scale, zero, 0, 255, relu_end=relu_end)
        given = x.clone()
        found = fake_quantize(given, scale, zero, 0, 255, relu_end=relu_end, in_place=True)
    with_gradients = fake_quantize(x.clone().requires_grad_(), scale, zero, 0, 255, relu_end=relu_end).detach()
    plain = x if relu_end is None else x.clamp(0, relu_end)
    separate = fake_quantize(plain, scale, zero, 0, 255)
    assert torch.equal(found, expected) and torch.equal(found, with_gradients) and torch.equal(found, separate)
    assert (found.data_ptr() == given.data_ptr()) == (dtype != torch.bfloat16)


def test_a_negative_scale_counts_by_its_magnitude_and_learns_as_such():
    x, upstream = values(), torch.randn(16, 6, 5, 5, dtype=torch.float64)
    scale = torch.tensor([0.2], dtype=torch.float64)
    y, grad_x, grad_scale = gradients(fake_quantize, (x, scale, None), upstream, 0, 15)
    z, other_x, other_scale = gradients(fake_quantize, (x, -scale, None), upstream, 0, 15)
    assert torch.equal(y, z) and torch.equal(grad_x, other_x) and torch.equal(grad_scale, -other_scale)
