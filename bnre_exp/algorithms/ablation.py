"""Which layers matter: what re-estimating each batch norm alone brings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bnre_exp.algorithms.bn_statistics import commit, names_with_statistics, write_statistics
from bnre_exp.algorithms.feeding import ForwardFn
from bnre_exp.algorithms.observed import observed_statistics
from bnre_exp.progress import Progress, no_progress


@torch.no_grad()
def reestimate_each_alone(
    model: nn.Module,
    dataloader: Iterable[Any],
    measure: Callable[[], float],
    num_batches: int = 100,
    forward_fn: ForwardFn | None = None,
    *,
    method: str = "batch_average",
    progress: Progress = no_progress,
) -> dict[str, float]:
    """What ``measure()`` gives with one batch norm re-estimated and all others as they are, by the name of that one;
    ``model`` is unchanged in the end.

    The statistics of every layer alone are those that it observes while all compute with the old ones, so that one pass
    over ``num_batches`` finds them all; ``measure`` is then called once a layer. Layers that no batch reaches are left
    out. Arguments, and what is raised, as of :func:`~bnre_exp.reestimate_bn_stats`.
    """
    bns = names_with_statistics(model)
    alone = observed_statistics(model, bns, dataloader, num_batches, forward_fn, method=method, progress=progress)
    found = {}
    for bn, statistics in progress(alone.items(), "re-estimate each alone", len(alone)):
        with commit(bns, {bn: statistics}, write_statistics):
            found[bns[bn]] = measure()
    return found
