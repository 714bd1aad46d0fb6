"""Fake quantization: weights as a parametrization, activations as modules, with fixed or learned (LSQ) ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.layout import WeightLayout
from bnre_exp.quantsim.quantizers.observer import RangeObserver
from bnre_exp.quantsim.quantizers.ranges import affine_grid
from bnre_exp.quantsim.quantizers.state import Quantizer, precise

MIN_SCALE = 1e-10  # far below any range that training reaches; keeps a learned scale off zero


class _FakeQuantize(torch.autograd.Function):
    """(clamp(round(x / s) + z, lo, hi) - z) * s with straight-through gradients.

    The zero point is added after rounding, as ONNX's QuantizeLinear does: ties, of which images that were 8-bit
    integers are full, then fall alike.

    The gradient of s is eq. 3 of Esser et al., "Learned step size quantization", ICLR 2020; that of z, which is
    non-zero for clipped values only, follows Bhalgat et al., "LSQ+", CVPR workshops 2020.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.low, ctx.high, ctx.gradient_scale = low, high, gradient_scale
        codes = x / scale
        if zero_point is None:
            return codes.round_().clamp_(low, high).mul_(scale)
        return codes.round_().add_(zero_point).clamp_(low, high).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (grad,) = gradients
        x, scale, zero_point = ctx.saved_tensors
        position = x / scale
        if zero_point is not None:
            position += zero_point
        inside = (position >= ctx.low) & (position <= ctx.high)
        grad_x = grad * inside
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            codes = (x / scale).round_() if zero_point is None else (x / scale).round_().add_(zero_point)
            codes.clamp_(ctx.low, ctx.high)
            zero = 0.0 if zero_point is None else zero_point
            slope = codes.sub_(torch.where(inside, position, zero))
            grad_scale = slope.mul_(grad).sum_to_size(scale.shape) * ctx.gradient_scale
        if zero_point is not None and ctx.needs_input_grad[2]:
            grad_zero = (grad * ~inside).mul_(-scale).sum_to_size(zero_point.shape) * ctx.gradient_scale
        return grad_x, grad_scale, grad_zero, None, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, gradient_scale: float = 1.0
) -> Tensor:
    """Round ``x`` to the grid ``(k - zero_point) * scale``, quant_min <= k <= quant_max, ``x / scale`` half to even.

    x: any shape; scale and zero_point broadcast against it. Works in the dtype of ``x`` (half types: in float32). The
    gradients of scale and zero_point are multiplied by ``gradient_scale``.
    """
    dtype = precise(x.dtype)
    zero_point = None if zero_point is None else zero_point.to(dtype)
    y = _FakeQuantize.apply(x.to(dtype), scale.to(dtype), zero_point, quant_min, quant_max, gradient_scale)
    return y.to(x.dtype)  # type: ignore[no-any-return]


def positive(scale: Tensor) -> Tensor:
    """A learned scale as it is used: its magnitude, at least MIN_SCALE; the gradient passes wherever it is."""
    magnitude = scale.abs()
    return magnitude + (magnitude.clamp_min(MIN_SCALE) - magnitude).detach()


def narrow_quant_max(bits: int) -> int:
    """Largest code of the narrow signed range: 7 for 4 bits, with -7 the smallest."""
    return int(2 ** (bits - 1) - 1)


class WeightQuantizer(Quantizer):
    """Parametrization of a layer's ``weight``: symmetric, narrow range.

    scale: ``[C_out]``, or ``[1]`` where not ``per_channel``, which the shape of a layer with one channel does not tell.
    """

    SCHEME = ("bits", "per_channel", "learned")

    def __init__(self, bits: int, layout: WeightLayout, scale: Tensor, learned: bool, per_channel: bool = True) -> None:
        super().__init__()
        self.bits, self.layout, self.learned, self.per_channel = bits, layout, learned, per_channel
        self.quant_max = narrow_quant_max(bits)
        self.bypassed = False
        self.scale: Tensor
        if learned:
            self.scale = nn.Parameter(scale.detach().clone())
        else:
            self.register_buffer("scale", scale.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        if self.bypassed:
            return weight
        gradient_scale = 1 / math.sqrt(weight.numel() / self.scale.numel() * self.quant_max)
        scale = self.layout.expand(positive(self.scale))
        return fake_quantize(weight, scale, None, -self.quant_max, self.quant_max, gradient_scale)

    def codes(self, weight: Tensor) -> Tensor:
        """The integer codes of a float weight: int8 up to 8 bits, else int16."""
        dtype = precise(weight.dtype)
        scale = self.layout.expand(positive(self.scale)).to(dtype)
        codes = (weight.to(dtype) / scale).round().clamp(-self.quant_max, self.quant_max)
        return codes.to(torch.int8 if self.bits <= 8 else torch.int16)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per_channel={self.per_channel}, scales={self.scale.numel()}, learned={self.learned}"


class Dequantize(Quantizer):
    """Parametrization of a folded layer's ``weight`` or ``bias`` (``ndim`` 1): integer codes times scale.

    scale: ``[C_out]``, or ``[1]`` where not ``per_channel``. dtype: of the product, None: as the scale's; casting the
    network changes it.
    """

    SCHEME = ("bits", "per_channel")

    def __init__(
        self,
        bits: int,
        ndim: int,
        transposed: bool,
        groups: int,
        in_channels: int,
        scale: Tensor,
        per_channel: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.ndim, self.transposed = bits, ndim, transposed
        self.groups, self.in_channels, self.per_channel = groups, in_channels, per_channel
        self.dtype = scale.dtype if dtype is None else dtype
        self.scale: Tensor
        self.register_buffer("scale", scale)

    @property
    def layout(self) -> WeightLayout:
        """Of the weight; a bias has none."""
        return WeightLayout(self.ndim, self.transposed, self.groups, self.in_channels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(self.scale.new_empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, codes: Tensor) -> Tensor:
        scale = self.scale.to(precise(self.scale.dtype))
        scale = scale if self.ndim == 1 else self.layout.expand(scale)
        return (codes.to(scale.dtype) * scale).to(self.dtype)


class ActivationQuantizer(Quantizer):
    """Per-tensor quantizer of an activation, on the grid ``0 .. 2^bits - 1``.

    ``unsigned``: the zero point is 0, for values that are never negative. Otherwise the zero point is an integer on the
    grid, so that real zero is exact. It quantizes once it has a range, from :func:`~bnre_exp.calibrate`; before that,
    calling it raises ``UserError`` unless it is bypassed or observing.
    """

    SCHEME = ("bits", "unsigned", "learned")

    def __init__(self, bits: int, unsigned: bool, learned: bool, label: str = "") -> None:
        super().__init__()
        self.bits, self.unsigned, self.learned, self.label = bits, unsigned, learned, label
        self.quant_max = 2**bits - 1
        self.bypassed = False
        self.observer: RangeObserver | None = None
        self.has_range = False
        self.scale: Tensor
        self.zero_point: Tensor
        scale, zero_point = torch.full((1,), torch.nan, dtype=torch.float32), torch.zeros(1, dtype=torch.float32)
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        if learned and not unsigned:
            self.zero_point = nn.Parameter(zero_point)
        else:
            self.register_buffer("zero_point", zero_point)
        self.register_load_state_dict_post_hook(ActivationQuantizer._note_range)

    @staticmethod
    def _note_range(module: nn.Module, _: Any) -> None:
        if isinstance(module, ActivationQuantizer):
            module.has_range = bool(torch.isfinite(module.scale).all())

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        """Cover ``[low, high]`` (real values), from 0 if it is unsigned; in place."""
        low = max(low, 0.0) if self.unsigned else low
        scale, zero_point = affine_grid(low, high, self.bits)
        self.scale.fill_(max(scale, MIN_SCALE))
        self.zero_point.fill_(zero_point)
        self.has_range = True

    def grid_zero_point(self) -> Tensor:
        """The integer zero point in use, ``[1]``; a learned one is rounded, with a straight-through gradient."""
        if self.unsigned or not self.learned:
            return self.zero_point
        rounded = self.zero_point.round().clamp(0, self.quant_max)
        return self.zero_point + (rounded - self.zero_point).detach()

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.observe(x)
            return x
        if self.bypassed:
            return x
        if not self.has_range:
            raise UserError(
                f"The activation quantizer of {self.label or 'a tensor'} has no range yet: "
                "run calibrate(sim, loader) before the quantized network is used."
            )
        features = x.numel() // max(1, x.shape[0]) if x.dim() else 1
        gradient_scale = 1 / math.sqrt(max(1, features) * self.quant_max)
        zero_point = None if self.unsigned else self.grid_zero_point()
        return fake_quantize(x, positive(self.scale), zero_point, 0, self.quant_max, gradient_scale)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, unsigned={self.unsigned}, learned={self.learned}, label={self.label!r}"
