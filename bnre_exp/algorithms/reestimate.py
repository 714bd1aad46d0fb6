"""Re-estimation of batch-norm statistics, undoable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from bnre_exp.algorithms.bn_statistics import METHODS, Estimator, Statistics, recording, write_statistics
from bnre_exp.algorithms.feeding import (
    ForwardFn,
    Passes,
    cached_weights,
    device_of,
    evaluation_mode,
    feed,
    take_batches,
)
from bnre_exp.errors import UserError
from bnre_exp.progress import Progress, no_progress


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
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


@torch.no_grad()
def reestimate_bn_stats(
    model: nn.Module,
    dataloader: Iterable[Any],
    num_batches: int = 100,
    forward_fn: ForwardFn | None = None,
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
        cache = cached_weights(model, forward_fn)
        with evaluation_mode(model), recording(bns, estimators), cache:
            for batch in progress(take_batches(dataloader, num_batches, count), "re-estimate", num_batches):
                feed(model, batch, device, forward_fn)
    finally:
        write_statistics(before)
    after = {bn: e.result(before[bn][0].dtype) for bn, e in estimators.items() if e.calls}
    bad = [bns[bn] for bn, statistics in after.items() if not all(bool(x.isfinite().all()) for x in statistics)]
    if bad:
        raise UserError(
            f"Re-estimation gave statistics that are not finite for {', '.join(bad[:5])}"
            f"{' and others' if len(bad) > 5 else ''}; the old ones are kept. Look for NaN in the data or weights."
        )
    write_statistics(after)
    return ReestimationHandle(
        num_batches=count.batches,
        passes=count.passes,
        unreached=tuple(bns[bn] for bn in bns if bn not in after),
        without_statistics=tuple(name for bn, name in names.items() if bn not in bns),
        frozen=frozen,
        _before={bn: before[bn] for bn in after},
    )
