"""Fake quantization of a tensor, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnre_exp.quantsim.quantizers.state import precise

MIN_SCALE = 1e-10  # far below any range that training reaches; keeps a learned scale off zero
COARSE = 255  # the largest code up to which values are near enough to steps for sums of values
CHUNK = 2**18  # products that are added up in float32, before their sums are
_where_inside = torch.ops.aten.hardtanh_backward  # (values, x, low, high): the values where low < x < high, else 0


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    gradient_scale: float = 1.0,
    *,
    relu_end: float | None = None,
    in_place: bool = False,
) -> Tensor:
    """Round ``x`` to the grid ``(k - zero_point) * scale``, quant_min <= k <= quant_max, ``x / scale`` half to even.

    x: any shape; scale and zero_point broadcast against it. Of a scale its magnitude counts, at least MIN_SCALE; a
    zero point is rounded to the grid. Works in the dtype of ``x`` (half types: in float32). The gradients of scale and
    zero_point are multiplied by ``gradient_scale``.

    relu_end: the result and the gradients are those for ``clamp(x, 0, relu_end)``, a ReLU (infinity) or ReLU6, for a
    grid from 0 without a zero point; an end that is finite is for values of a CPU.
    in_place: ``x`` may be overwritten, which needs gradients to be off.
    """
    dtype = precise(x.dtype)
    zero_point = None if zero_point is None else zero_point.to(dtype)
    values, scale = x.to(dtype), scale.to(dtype)
    if in_place or values is not x and not torch.is_grad_enabled():
        used, zero = _used(scale), _on_grid(zero_point, quant_min, quant_max)
        if _ends_first(relu_end, used, quant_max):
            values.clamp_(0, relu_end)
        y = _codes_to_values(values.div_(used), used, zero, quant_min, quant_max)
    else:
        y = _FakeQuantize.apply(values, scale, zero_point, quant_min, quant_max, gradient_scale, relu_end)
    return y.to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    """(clamp(round(x / s) + z, lo, hi) - z) * s with straight-through gradients.

    The zero point is added after rounding, as ONNX's QuantizeLinear does: ties, of which images that were 8-bit
    integers are full, then fall alike.

    The gradient of s is eq. 3 of Esser et al., "Learned step size quantization", ICLR 2020; that of z, which is
    non-zero for clipped values only, follows Bhalgat et al., "LSQ+", CVPR workshops 2020. With y the result, the slope
    of eq. 3 is (y - x) / s inside the range and y / s outside, which needs no second rounding.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, gradient_scale: float,
        relu_end: float | None,
    ) -> Tensor:  # fmt: skip
        used, zero = _used(scale), _on_grid(zero_point, low, high)
        ctx.is_relu_first = _ends_first(relu_end, used, high)
        if ctx.is_relu_first:
            x = x.clamp(0, relu_end)
        y = _codes_to_values(x / used, used, zero, low, high)
        ctx.save_for_backward(x, y, used, scale, zero)
        ctx.low, ctx.high, ctx.gradient_scale, ctx.relu_end = low, high, gradient_scale, relu_end
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, y, scale, raw_scale, zero_point = ctx.saved_tensors
        (grad,) = gradients
        compared, low, high = _range(x, scale, zero_point, ctx)
        grad_x = _where_inside(grad, compared, low, high)
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            # What the ReLU clips lies inside the range, if that does not end first.
            inside = x if ctx.is_relu_first else None
            if ctx.high <= COARSE:
                slope = _products([(grad, y), (grad_x, x) if inside is None else (grad, x)], scale.shape)
            else:  # the difference of two sums of values would be the rounding of these sums
                inside = _where_inside(x, compared, low, high) if inside is None else inside
                slope = _products([(grad, y - inside)], scale.shape)
            grad_scale = slope.div_(scale).mul_(raw_scale.sgn()).mul_(ctx.gradient_scale)
        if zero_point is not None and ctx.needs_input_grad[2]:
            outside = grad_x.sum_to_size(zero_point.shape) - grad.sum_to_size(zero_point.shape)
            grad_zero = outside.mul_(scale).mul_(ctx.gradient_scale)
        return grad_x, grad_scale, grad_zero, None, None, None, None


def _used(scale: Tensor) -> Tensor:
    return scale.abs().clamp_min_(MIN_SCALE)


def _ends_first(relu_end: float | None, scale: Tensor, quant_max: int) -> bool:
    """Whether a ReLU ends where the grid does, or before."""
    return relu_end is not None and math.isfinite(relu_end) and relu_end <= float(scale) * quant_max * (1 + 1e-6)


def _on_grid(zero_point: Tensor | None, low: int, high: int) -> Tensor | None:
    return None if zero_point is None else zero_point.round().clamp_(low, high)


def _codes_to_values(steps: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int) -> Tensor:
    """In place: from ``x / scale`` to the values that it is rounded to."""
    if zero_point is None:
        return steps.round_().clamp_(low, high).mul_(scale)
    return steps.round_().add_(zero_point).clamp_(low, high).sub_(zero_point).mul_(scale)


def _range(x: Tensor, scale: Tensor, zero_point: Tensor | None, ctx: Any) -> tuple[Tensor, float, float]:
    """What has to lie between which two numbers for x to be inside the range: its ends are, but for those
    of a ReLU."""
    if ctx.is_relu_first:
        return x, 0.0, ctx.relu_end
    rounding = torch.finfo(x.dtype).eps * 2 ** math.floor(math.log2(ctx.high))  # from the largest code to the next
    if scale.numel() == 1 and x.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = ctx.low - 4 * rounding, ctx.high + 4 * rounding
        step, zero = float(scale), 0.0 if zero_point is None else float(zero_point)
        return x, 0.0 if ctx.relu_end is not None else (low - zero) * step, (high - zero) * step
    position = x / scale  # a scale that another device holds is not waited for
    if zero_point is not None:
        position += zero_point
    return position, 0.0 if ctx.relu_end is not None else ctx.low - rounding, ctx.high + rounding


def _products(pairs: list[tuple[Tensor, Tensor]], shape: torch.Size) -> Tensor:
    """The products of the first pair, minus those of a second one, added up to a shape that broadcasts against them."""
    made = pairs[0][1]  # by an operation, so it lies in memory without gaps, as do others of the same strides
    is_flat = all(t.stride() == made.stride() for pair in pairs for t in pair)
    if shape.numel() > 1 or not is_flat or torch.compiler.is_compiling():
        products = pairs[0][0] * made
        for a, b in pairs[1:]:
            products.addcmul_(a, b, value=-1)
        return products.sum_to_size(shape)
    sums = [torch.stack([torch.dot(*both) for both in zip(*map(_chunks, pair))]) for pair in pairs]
    return (sums[0] - sums[1] if len(sums) > 1 else sums[0]).sum().reshape(shape)


def _chunks(dense: Tensor) -> tuple[Tensor, ...]:
    return dense.as_strided((dense.numel(),), (1,), dense.storage_offset()).split(CHUNK)


def positive(scale: Tensor) -> Tensor:
    """A learned scale as it is used: its magnitude, at least MIN_SCALE; the gradient passes wherever it is."""
    magnitude = scale.abs()
    return magnitude + (magnitude.clamp_min(MIN_SCALE) - magnitude).detach()
