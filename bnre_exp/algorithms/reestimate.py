"""Re-estimation of batch-norm statistics, undoable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from bnre_exp.errors import UserError
from bnre_exp.progress import Progress, no_progress
from bnre_exp.stages.evaluate import cached_weights
from bnre_exp.stages.inputs import ForwardFn, Passes, device_of, evaluation_mode, feed, take_batches

METHODS = ("batch_average", "pooled", "ema")
Statistics = tuple[Tensor, Tensor]  # running_mean, running_var, each [C]


@dataclass
class ReestimationHandle:
    """Undoes a re-estimation: ``remove()``, or leaving a ``with`` block, puts the old statistics back.

    num_batches: batches used; passes: passes over the loader that they took; unreached: names of BNs that the forward
    pass never called, which keep their statistics; without_statistics: names of BNs that have none to estimate;
    frozen: names of FrozenBatchNorm2d modules, whose statistics are constants.
    """

    num_batches: int
    passes: int
    unreached: tuple[str, ...]
    without_statistics: tuple[str, ...]
    frozen: tuple[str, ...]
    _before: dict[Any, Statistics] = field(repr=False, default_factory=dict)

    @torch.no_grad()
    def remove(self) -> None:
        """Restore the statistics of before, bit for bit. A second call does nothing."""
        while self._before:
            bn, (mean, var) = self._before.popitem()
            bn.running_mean.copy_(mean)
            bn.running_var.copy_(var)

    def __enter__(self) -> ReestimationHandle:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.remove()


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


@torch.no_grad()
def reestimate_bn_stats(
    model: nn.Module,
    dataloader: Iterable[Any],
    num_batches: int = 100,
    forward_fn: Optional[ForwardFn] = None,
    *,
    method: str = "batch_average",
    momentum: float = 0.1,
    progress: Progress = no_progress,
) -> ReestimationHandle:
    """Replace the running statistics of every BN that ``model`` calls; in place, and nothing else changes.

    model: any module with BN, a simulation or not. Only its BNs are in training mode meanwhile; dropout is off.
    dataloader: training data; one shorter than ``num_batches`` is iterated again. Batches: a tensor, or a tuple or list
    whose first element is the input; ``forward_fn(model, batch)`` for anything else.
    method: "batch_average", the plain mean over batches of their means and unbiased variances (as AIMET does);
    "pooled", the statistics of all samples together, weighted by their number; "ema", an exponential moving average
    that starts from the present statistics and gives the newest batch the weight ``momentum``, as training does.

    Returns a handle that undoes it. Raises ``UserError`` if num_batches is below 1, the method is unknown, the loader
    is empty, a BN sees one value per channel, or a statistic is not finite; the statistics are then those of before.

    Source: Nagel et al., "Overcoming oscillations in quantization-aware training", ICML 2022, section 4.1.
    """
    if method not in METHODS:
        raise UserError(f"method={method!r}: expected one of {', '.join(METHODS)}.")
    if num_batches < 1:
        raise UserError(f"num_batches={num_batches}: expected at least 1; to leave re-estimation out, do not call it.")
    names = {module: name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    bns: dict[Any, str] = {
        bn: name for bn, name in names.items() if bn.running_mean is not None and bn.running_var is not None
    }
    frozen = tuple(name for name, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d))
    if not bns and frozen:
        raise UserError(
            f"All {len(frozen)} batch norms of the model are FrozenBatchNorm2d, whose statistics are constants; build "
            "it with norm_layer=torch.nn.BatchNorm2d to re-estimate them (the state dict fits, with strict=False)."
        )
    if not bns:
        raise UserError("The model has no batch norm with running statistics (is it folded already?).")
    before = {bn: (bn.running_mean.clone(), bn.running_var.clone()) for bn in bns}
    estimators = {bn: Estimator(method, momentum, *before[bn]) for bn in bns}
    count, device = Passes(), device_of(model)
    try:
        cache = cached_weights(model if forward_fn is None else nn.Identity())
        with evaluation_mode(model), _recording(bns, estimators), cache:
            for batch in progress(take_batches(dataloader, num_batches, count), "re-estimate", num_batches):
                feed(model, batch, device, forward_fn)
    finally:
        _write(before)
    after = {bn: e.result(before[bn][0].dtype) for bn, e in estimators.items() if e.calls}
    bad = [bns[bn] for bn, statistics in after.items() if not all(bool(x.isfinite().all()) for x in statistics)]
    if bad:
        raise UserError(
            f"Re-estimation gave statistics that are not finite for {', '.join(bad[:5])}"
            f"{' and others' if len(bad) > 5 else ''}; the old ones are kept. Look for NaN in the data or weights."
        )
    _write(after)
    return ReestimationHandle(
        num_batches=count.batches,
        passes=count.passes,
        unreached=tuple(bns[bn] for bn in bns if bn not in after),
        without_statistics=tuple(name for bn, name in names.items() if bn not in bns),
        frozen=frozen,
        _before={bn: before[bn] for bn in after},
    )


def has_running_statistics(model: nn.Module) -> bool:
    """Whether there is anything to re-estimate."""
    return any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())


def _write(statistics: dict[Any, Statistics]) -> None:
    for bn, (mean, var) in statistics.items():
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(var)


@contextmanager
def _recording(bns: dict[Any, str], estimators: dict[Any, Estimator]) -> Iterator[None]:
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


def _restore(bn: _BatchNorm, momentum: Optional[float], tracked: Optional[Tensor], training: bool) -> None:
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
