"""Statistics of batch norms over several batches: the estimators, and how a network's batch norms are observed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp.errors import UserError

METHODS = ("batch_average", "pooled", "ema")

Statistics = tuple[Tensor, Tensor]  # running_mean, running_var, each [C]


class Estimator:
    """Statistics of one BN from the mean and unbiased variance of each of its calls, accumulated in float64."""

    def __init__(self, method: str, momentum: float, mean: Tensor, var: Tensor) -> None:
        self.method, self.momentum = method, momentum
        self.calls, self.count = 0, 0
        start = (mean, var) if method == "ema" else (torch.zeros_like(mean), torch.zeros_like(var))
        self.mean, self.spread = (values.to(torch.float64, copy=True) for values in start)

    def add(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Take in one call over ``count`` values a channel."""
        mean, var = mean.double(), var.double()
        self.calls += 1
        if self.method == "ema":
            self.mean += self.momentum * (mean - self.mean)
            self.spread += self.momentum * (var - self.spread)
        elif self.method == "batch_average":
            self.mean += (mean - self.mean) / self.calls
            self.spread += (var - self.spread) / self.calls
        else:  # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm", 1979
            total = self.count + count
            shift = mean - self.mean
            self.mean += shift * (count / total)
            self.spread += var * (count - 1) + shift.square() * (self.count * count / total)
            self.count = total

    def result(self, dtype: torch.dtype) -> Statistics:
        """Mean and unbiased variance."""
        spread = self.spread / (self.count - 1) if self.method == "pooled" else self.spread
        return self.mean.to(dtype), spread.to(dtype)


def has_running_statistics(model: nn.Module) -> bool:
    """Whether there is anything to re-estimate."""
    return any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())


def write_statistics(statistics: dict[Any, Statistics]) -> None:
    for bn, (mean, var) in statistics.items():
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(var)


@contextmanager
def recording(bns: dict[Any, str], estimators: dict[Any, Estimator]) -> Iterator[None]:
    """BNs in training mode with momentum 1, so that after a call the buffers hold the statistics of that call."""
    with ExitStack() as stack:
        for bn, name in bns.items():
            stack.callback(_restore, bn, bn.momentum, bn.num_batches_tracked, bn.training)
            if bn.num_batches_tracked is not None:
                bn.num_batches_tracked = bn.num_batches_tracked.clone()
            bn.momentum, bn.training = 1.0, True
            before, after = _hooks(name, estimators[bn])
            stack.callback(bn.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(bn.register_forward_hook(after, with_kwargs=True).remove)
        yield


def _restore(bn: _BatchNorm, momentum: float | None, tracked: Tensor | None, training: bool) -> None:
    bn.momentum, bn.num_batches_tracked, bn.training = momentum, tracked, training


def _hooks(name: str, estimator: Estimator) -> tuple[Any, Any]:
    def values_per_channel(args: Any, kwargs: Any) -> int:
        x = args[0] if args else kwargs["input"]
        return int(x.numel() // x.shape[1]) if x.shape[1] else 0

    def before(bn: Any, args: Any, kwargs: Any) -> None:
        if values_per_channel(args, kwargs) < 2:
            raise UserError(
                f"The batch norm {name} gets a batch with one value per channel, which has no variance; use larger "
                "batches (drop_last=True drops a short last one)."
            )
        # Old values that are not finite would survive their weight of zero.
        bn.running_mean.zero_()
        bn.running_var.zero_()

    def after(bn: Any, args: Any, kwargs: Any, _: Any) -> None:
        estimator.add(bn.running_mean, bn.running_var, values_per_channel(args, kwargs))

    return before, after
