"""A batch norm in training and the quantizer behind it as one step of autograd, which keeps one tensor less.

A quantizer's gradient needs what went into it. Behind a batch norm that can be computed again from what the batch norm
keeps for its own gradient: its input, mean and standard deviation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bnre_exp.quantsim.quantizers.fake_quantize import Grid, gradients
from bnre_exp.quantsim.quantizers.layout import forward_of


def can_be_joined(x: Tensor, bn: Any) -> bool:
    """Whether :func:`batch_norm_and_quantize` computes what ``bn(x)``, then a quantizer, would."""
    if forward_of(bn) is not nn.BatchNorm2d.forward or not torch.is_grad_enabled():
        return False
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    tensors = [bn.weight, bn.bias, bn.running_mean, bn.running_var]
    has_all = all(t is not None and t.dtype == x.dtype for t in tensors)
    is_usual = has_all and bn.training and bn.track_running_stats and bn.momentum is not None
    return bool(is_usual and x.dim() >= 2 and x.shape[1] < x.numel())  # more than one value a channel, or bn refuses


def batch_norm_and_quantize(
    x: Tensor, bn: Any, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, gradient_scale: float,
    relu_end: float | None,
) -> Tensor:  # fmt: skip
    """``fake_quantize(bn(x), ...)`` with its gradients, for what :func:`can_be_joined` said yes to."""
    bn._check_input_dim(x)
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    statistics = bn.running_mean, bn.running_var, bn.momentum, bn.eps
    zero_point = None if zero_point is None else zero_point.to(x.dtype)
    return _BatchNormAndQuantize.apply(  # type: ignore[no-any-return]
        x, bn.weight, bn.bias, scale.to(x.dtype), zero_point, statistics, quant_min, quant_max, gradient_scale, relu_end
    )


class _BatchNormAndQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero_point: Tensor | None, statistics: Any,
        low: int, high: int, gradient_scale: float, relu_end: float | None,
    ) -> Tensor:  # fmt: skip
        running_mean, running_var, momentum, ctx.eps = statistics
        normalized, mean, inverse = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, ctx.eps
        )
        ctx.grid, ctx.relu_end, ctx.gradient_scale = Grid.of(x, scale, zero_point, low, high), relu_end, gradient_scale
        if ctx.grid.reaches(relu_end):
            normalized.clamp_(0, relu_end)
        y = ctx.grid.values_(normalized.div_(ctx.grid.scale))
        ctx.save_for_backward(x, weight, bias, mean, inverse, y, scale, zero_point)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        x, weight, bias, mean, inverse, y, scale, zero_point = ctx.saved_tensors
        normalized = torch.native_batch_norm(x, weight, bias, mean, inverse.pow(-2), False, 0.0, 0.0)[0]
        if ctx.grid.reaches(ctx.relu_end):
            normalized.clamp_(0, ctx.relu_end)
        grad, grad_scale, grad_zero = gradients(
            upstream[0], normalized, y, scale, zero_point, ctx.grid, ctx.gradient_scale, ctx.relu_end,
            ctx.needs_input_grad[3:5],
        )  # fmt: skip
        of_batch_norm = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return *of_batch_norm, grad_scale, grad_zero, None, None, None, None, None
