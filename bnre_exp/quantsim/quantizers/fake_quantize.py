"""Fake quantization of a tensor, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        grid = Grid.of(values, scale, zero_point, quant_min, quant_max)
        if grid.reaches(relu_end):
            values.clamp_(0, relu_end)
        y = grid.values_(values.div_(grid.scale))
    else:
        y = _FakeQuantize.apply(values, scale, zero_point, quant_min, quant_max, gradient_scale, relu_end)
    return y.to(x.dtype)


class Grid(NamedTuple):
    """The grid ``(k - zero) * scale``, low <= k <= high, as it is used.

    A single scale for values of a CPU, and its zero point, are plain numbers: what is computed of them then costs no
    operations, which for small tensors are most of the time.
    """

    scale: Tensor | float
    zero: Tensor | float
    low: int
    high: int

    @classmethod
    def of(cls, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int) -> Grid:
        if scale.numel() == 1 and x.device.type == "cpu" and not torch.compiler.is_compiling():
            zero = 0.0 if zero_point is None else min(max(float(zero_point), low), high)
            return cls(max(abs(float(scale)), MIN_SCALE), zero if math.isnan(zero) else round(zero), low, high)
        on_grid = 0.0 if zero_point is None else zero_point.round().clamp_(low, high)
        return cls(scale.abs().clamp_min_(MIN_SCALE), on_grid, low, high)

    def values_(self, steps: Tensor) -> Tensor:
        """In place: from ``x / scale`` to the values that it is rounded to."""
        low, high = self.low - self.zero, self.high - self.zero
        return steps.round_().clamp_(low, high).mul_(self.scale)  # type: ignore[arg-type]

    def reaches(self, relu_end: float | None) -> bool:
        """Whether a ReLU ends where the grid does, or before."""
        if relu_end is None or math.isinf(relu_end):
            return False
        return relu_end <= float(self.scale) * self.high * (1 + 1e-6)

    def inside(self, x: Tensor, is_after_relu: bool) -> tuple[Tensor, float, float]:
        """What has to lie between which two numbers for x to be inside the range: its ends are, but for zero after
        a ReLU."""
        rounding = torch.finfo(x.dtype).eps * 2 ** math.floor(math.log2(self.high))  # from the largest code to the next
        if isinstance(self.scale, float) and isinstance(self.zero, float | int):
            low, high = self.low - self.zero - 4 * rounding, self.high - self.zero + 4 * rounding
            return x, 0.0 if is_after_relu else low * self.scale, high * self.scale
        position = x / self.scale  # a scale that another device holds is not waited for
        if isinstance(self.zero, Tensor):
            position += self.zero
        return position, 0.0 if is_after_relu else self.low - rounding, self.high + rounding


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
        grid = Grid.of(x, scale, zero_point, low, high)
        if grid.reaches(relu_end):
            x = x.clamp(0, relu_end)
        y = grid.values_(x / grid.scale)
        ctx.save_for_backward(x, y, scale, zero_point)
        ctx.grid, ctx.gradient_scale, ctx.relu_end = grid, gradient_scale, relu_end
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        x, y, scale, zero_point = ctx.saved_tensors
        found = gradients(
            upstream[0], x, y, scale, zero_point, ctx.grid, ctx.gradient_scale, ctx.relu_end, ctx.needs_input_grad[1:3]
        )
        return *found, None, None, None, None


def gradients(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, gradient_scale: float,
    relu_end: float | None, are_needed: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Of what went in, the scale and the zero point, the latter two where ``are_needed``.

    grad: of the result ``y``; x: what went in, after a ReLU that ends first, as :meth:`Grid.reaches` has it.
    """
    is_relu_first = grid.reaches(relu_end)

    def where_inside(values: Tensor) -> Tensor:
        return _where_inside(values, *((x, 0.0, relu_end) if is_relu_first else grid.inside(x, relu_end is not None)))

    grad_x = where_inside(grad)
    grad_scale = grad_zero = None
    if are_needed[0]:
        # What the ReLU clips lies inside the range, if that does not end first.
        if grid.high <= COARSE:
            pairs = [(grad, y), (grad, x) if is_relu_first else (x, grad_x)]
        else:  # the difference of two sums of values would be the rounding of these sums
            pairs = [(grad, y - (x if is_relu_first else where_inside(x)))]
        grad_scale = _slope(pairs, scale, grid.scale, gradient_scale)
    if zero_point is not None and are_needed[1]:
        grad_zero = _shift(grad_x, grad, zero_point, grid.scale, gradient_scale)
    return grad_x, grad_scale, grad_zero


def _slope(pairs: list[tuple[Tensor, Tensor]], scale: Tensor, step: Tensor | float, gradient_scale: float) -> Tensor:
    """The gradient of a scale, whose magnitude in use is ``step``: the product of the first pair, minus that of a
    second one, over the step."""
    if isinstance(step, float):
        first, *second = (_inner(*pair) for pair in pairs)
        slope = (first - sum(second)) / math.copysign(step, float(scale))
        return torch.full_like(scale, slope * gradient_scale)
    products = torch.mul(*pairs[0])
    for a, b in pairs[1:]:
        products.addcmul_(a, b, value=-1)
    return products.sum_to_size(scale.shape).mul_(gradient_scale).div_(torch.copysign(step, scale))


def _shift(grad_x: Tensor, grad: Tensor, zero_point: Tensor, step: Tensor | float, gradient_scale: float) -> Tensor:
    """The gradient of a zero point: minus the sum of the gradients of clipped values, times the step."""
    if isinstance(step, float):
        return torch.full_like(zero_point, (float(grad_x.sum()) - float(grad.sum())) * step * gradient_scale)
    clipped = grad_x.sum_to_size(zero_point.shape) - grad.sum_to_size(zero_point.shape)
    return clipped.mul_(step).mul_(gradient_scale)


def _inner(a: Tensor, made: Tensor) -> float:
    """The inner product; what an operation has made lies in memory without gaps, as do others of the same strides."""
    if a.stride() != made.stride():
        return float((a * made).sum())
    if made.numel() <= CHUNK:
        return float(torch.dot(_flat(a), _flat(made)))
    return sum(float(torch.dot(*chunks)) for chunks in zip(_flat(a).split(CHUNK), _flat(made).split(CHUNK)))


def _flat(dense: Tensor) -> Tensor:
    return dense.as_strided((dense.numel(),), (1,), dense.storage_offset())


def positive(scale: Tensor) -> Tensor:
    """A learned scale as it is used: its magnitude, at least MIN_SCALE; the gradient passes wherever it is."""
    magnitude = scale.abs()
    return magnitude + (magnitude.clamp_min(MIN_SCALE) - magnitude).detach()
