"""What batch norms get when the network computes with the statistics that it has, as it will when it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from bnre_exp.algorithms.bn_statistics import Estimator, Statistics, check_count, input_of_call, observe_batches
from bnre_exp.algorithms.feeding import ForwardFn, Passes, cached_weights, device_of, evaluation_mode, feed
from bnre_exp.algorithms.speed import autocast
from bnre_exp.algorithms.unchanged import unchanged
from bnre_exp.progress import Progress, no_progress


@torch.no_grad()
def observed_statistics(
    model: nn.Module,
    bns: Mapping[Any, str],
    dataloader: Iterable[Any],
    num_batches: int,
    forward_fn: ForwardFn | None = None,
    *,
    method: str = "batch_average",
    momentum: float = 0.1,
    precision: str = "float32",
    progress: Progress = no_progress,
) -> dict[Any, Statistics]:
    """Mean and unbiased variance, ``[C]`` each, of what every BN gets while ``model`` is in evaluation mode; nothing
    changes. Re-estimation observes them while every BN normalizes by the batch instead.

    bns: BN modules with running statistics, and their names. Other arguments as of
    :func:`~bnre_exp.reestimate_bn_stats`. BNs that no batch reaches are not in the result. Raises ``UserError`` as it
    does for batches.
    """
    estimators = {bn: Estimator(method, momentum, bn.running_mean, bn.running_var) for bn in bns}
    device, count = device_of(model), Passes()

    def before(bn: Any, args: Any, kwargs: Any) -> None:
        x, number = input_of_call(args, kwargs)
        check_count(bns[bn], number)
        var, mean = torch.var_mean(x.double() if x.dtype == torch.float64 else x.float(), [0, *range(2, x.dim())])
        estimators[bn].add(mean, var, number)

    def observe(batch: Any) -> None:
        with evaluation_mode(model), autocast(device, precision):
            feed(model, batch, device, forward_fn)

    with ExitStack() as stack:
        stack.enter_context(cached_weights(model, forward_fn))
        stack.enter_context(unchanged(model))
        for bn in bns:
            stack.callback(bn.register_forward_pre_hook(before, with_kwargs=True).remove)
        for _ in observe_batches(dataloader, num_batches, observe, count, progress):
            pass
    return {bn: each.result(bn.running_mean.dtype) for bn, each in estimators.items() if each.calls}


def self_consistency(used: Mapping[Any, Statistics], observed: Mapping[Any, Statistics]) -> float:
    """How far the statistics in use are from those observed under them: the root mean square, over all channels, of the
    mean of what the BN has normalized, before its affine. 0: consistent. used, observed: by the BN."""
    shifts = []
    for bn, (mean, _) in observed.items():
        centre, var = (x.double() for x in used[bn])
        shift = (mean.double() - centre) / (var + bn.eps).sqrt()  # a constant channel has no variance
        shifts.append(torch.where(mean.double() == centre, 0.0, shift))
    return float(torch.cat(shifts).square().mean().sqrt()) if shifts else 0.0
