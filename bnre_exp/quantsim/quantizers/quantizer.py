"""Fake quantization: weights as a parametrization, activations as modules, with fixed or learned (LSQ) ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.after_batch_norm import batch_norm_and_quantize, can_be_joined
from bnre_exp.quantsim.quantizers.fake_quantize import MIN_SCALE, fake_quantize, positive
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, LAYERS, WeightLayout, forward_of
from bnre_exp.quantsim.quantizers.observer import RangeObserver
from bnre_exp.quantsim.quantizers.ranges import affine_grid
from bnre_exp.quantsim.quantizers.state import Quantizer, code_dtype, precise

RELUS: dict[type, float] = {nn.ReLU: math.inf, nn.ReLU6: 6.0}  # where each ends
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.GELU, nn.Mish, nn.ELU, nn.Tanh,
    nn.LeakyReLU,
)  # fmt: skip
# What these compute lies in memory of its own, unless they work in place.
_ALLOCATING = {kind.forward for kind in (*BATCH_NORMS, *LAYERS, *ACTIVATIONS)}


def narrow_quant_max(bits: int) -> int:
    """Largest code of the narrow signed range: 7 for 4 bits, with -7 the smallest."""
    return int(2 ** (bits - 1) - 1)


class WeightQuantizer(Quantizer):
    """Parametrization of a layer's ``weight``: signed codes times a scale, with real zero at code 0.

    scale: ``[C_out]``, or ``[1]`` where not ``per_channel``, which the shape of a layer with one channel does not tell.
    zero_point: None for the narrow grid, of the codes ``-quant_max`` to ``quant_max``. Of the shape of the scale for
    the full grid, of all 2^bits codes: 0 where it reaches from ``-quant_max - 1`` to ``quant_max``; -1 where it is
    mirrored, from ``-quant_max`` to ``quant_max + 1``, for a channel whose codes change their sign when BN is folded.
    """

    SCHEME = ("bits", "per_channel", "learned", "full_grid")

    def __init__(
        self,
        bits: int,
        layout: WeightLayout,
        scale: Tensor,
        learned: bool,
        per_channel: bool = True,
        zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.layout, self.learned, self.per_channel = bits, layout, learned, per_channel
        self.full_grid = zero_point is not None
        self.quant_max = narrow_quant_max(bits)
        self.quant_min = -self.quant_max - int(self.full_grid)
        self.bypassed = False
        self.scale: Tensor
        self.zero_point: Tensor | None
        # Floating point, as that of activations is: averages of state dicts (EMA) are rounded when they are used.
        self.register_buffer("zero_point", None if zero_point is None else zero_point.detach().float().clone())
        if learned:
            self.scale = nn.Parameter(scale.detach().clone())
        else:
            self.register_buffer("scale", scale.detach().clone())

    @property
    def mirrored(self) -> Tensor:
        """Which channels have the mirrored grid, bool, of the shape of the scale."""
        return torch.zeros_like(self.scale, dtype=torch.bool) if self.zero_point is None else self.zero_point < -0.5

    def forward(self, weight: Tensor) -> Tensor:
        if self.bypassed:
            return weight
        scale = self.layout.expand(self.scale)
        zero_point = None if self.zero_point is None else self.layout.expand(self.zero_point)
        return fake_quantize(weight, scale, zero_point, self.quant_min, self.quant_max, self.gradient_scale(weight))

    def gradient_scale(self, weight: Tensor) -> float:
        """By what the gradient of a learned scale is multiplied (LSQ): 1/sqrt(elements of a channel * quant_max)."""
        return 1 / math.sqrt(weight.numel() / self.scale.numel() * self.quant_max)

    def codes(self, weight: Tensor) -> Tensor:
        """The integer codes of a float weight, in the smallest type that holds them: int8 up to 8 bits (a mirrored grid
        ends one code above what its bits hold: up to 7), int16 beyond."""
        dtype = precise(weight.dtype)
        scale = self.layout.expand(positive(self.scale)).to(dtype)
        mirrored = self.layout.expand(self.mirrored).to(dtype)
        codes = (weight.to(dtype) / scale).round().clamp(self.quant_min + mirrored, self.quant_max + mirrored)
        return codes.to(code_dtype(self.bits + int(self.full_grid)))

    def _check_scheme(self, prefix: str, state: Any) -> None:
        is_of_before = isinstance(state, Tensor) and state.numel() == len(self.SCHEME) - 1  # when all grids were narrow
        super()._check_scheme(prefix, torch.cat([state.flatten(), state.new_zeros(1)]) if is_of_before else state)

    def extra_repr(self) -> str:
        grid = f"{'full' if self.full_grid else 'narrow'} grid"
        scales = f"per_channel={self.per_channel}, scales={self.scale.numel()}, learned={self.learned}"
        return f"bits={self.bits}, {grid}, {scales}"


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
        return self._quantize(x)

    def after(self, x: Tensor, relu: nn.Module | None, maker: nn.Module | bool) -> Tensor:
        """``self(relu(x))``, in fewer passes where that is the same; for the code of a simulation.

        maker: the module that made ``x``, for this alone; True: a function did; False: others read it. If nobody else
        looks at ``x``, by a hook neither, and gradients are off, it is overwritten.
        """
        is_plain = torch.compiler.is_compiling() or not self.is_in_use or not has_one_layout(x)
        if is_plain or is_watched(self) or is_watched(relu):
            return self(x if relu is None else relu(x))  # type: ignore[no-any-return]
        relu_end = None if relu is None else self._relu_end(relu, x)
        may_overwrite = is_own(maker)
        if relu is not None and relu_end is None:
            x, may_overwrite = relu(x), is_own(relu)
        return self._quantize(x, relu_end, may_overwrite and not torch.is_grad_enabled())

    def after_batch_norm(self, x: Tensor, relu: nn.Module | None, bn: nn.Module) -> Tensor:
        """``self.after(bn(x), relu, bn)``, with less kept for gradients where that is the same."""
        is_watched_here = is_watched(self) or is_watched(relu) or is_watched(bn)
        can_be_taken_in = has_one_layout(x) and not (torch.compiler.is_compiling() or is_watched_here)
        relu_end = None if relu is None else self._relu_end(relu, x)
        if (
            not can_be_taken_in
            or not self.is_in_use
            or (relu_end is None) != (relu is None)
            or not can_be_joined(x, bn)
        ):
            return self.after(bn(x), relu, bn)
        return batch_norm_and_quantize(x, bn, self.scale, *self._rest(x), relu_end)

    @property
    def is_in_use(self) -> bool:
        """Whether it quantizes: it has a range, and neither observes nor is bypassed."""
        return self.has_range and not self.bypassed and self.observer is None

    def _relu_end(self, relu: nn.Module, x: Tensor) -> float | None:
        """Where a ReLU ends that is taken in; None: it is not."""
        end = RELUS.get(type(relu)) if self.unsigned else None
        is_waited_for = end is not None and math.isfinite(end) and x.device.type != "cpu"  # to know which ends first
        return None if is_waited_for else end

    def _quantize(self, x: Tensor, relu_end: float | None = None, in_place: bool = False) -> Tensor:
        return fake_quantize(x, self.scale, *self._rest(x), relu_end=relu_end, in_place=in_place)

    def _rest(self, x: Tensor) -> tuple[Tensor | None, int, int, float]:
        """Zero point, smallest and largest code, and the factor of the scale's gradient."""
        features = x.numel() // max(1, x.shape[0]) if x.dim() else 1
        gradient_scale = 1 / math.sqrt(max(1, features) * self.quant_max)
        return None if self.unsigned else self.zero_point, 0, self.quant_max, gradient_scale

    def extra_repr(self) -> str:
        return f"bits={self.bits}, unsigned={self.unsigned}, learned={self.learned}, label={self.label!r}"


def is_watched(module: nn.Module | None) -> bool:
    """Whether hooks see what goes into the module or comes out of it."""
    before = torch.nn.modules.module._global_forward_pre_hooks
    return module is not None and bool(module._forward_pre_hooks or before or _is_heard(module))


def has_one_layout(x: Tensor) -> bool:
    """Whether its strides say how it lies in memory. Where an axis has one element they do not, torch gives results
    other strides than what they are computed from has, and the kernels that read them round otherwise."""
    return 1 not in x.shape[1:]


def is_own(maker: nn.Module | bool) -> bool:
    """Whether what a module made for one reader is seen by that alone, and lies in memory of its own. A bool: it is
    known."""
    if isinstance(maker, bool):
        return maker
    return allocates(maker) and not getattr(maker, "inplace", False) and not _is_heard(maker)


def allocates(module: Any) -> bool:
    """Whether a module computes what torch's own batch norms, layers or activations do, and nothing after it."""
    return module is not None and forward_of(module) in _ALLOCATING


def _is_heard(module: nn.Module) -> bool:
    """Whether hooks see what comes out of the module, or its gradients."""
    known = torch.nn.modules.module
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or known._global_forward_hooks
        or known._global_backward_hooks
        or known._global_backward_pre_hooks
    )
