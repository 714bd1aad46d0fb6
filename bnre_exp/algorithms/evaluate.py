"""Evaluation of a network by its task."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bnre_exp.algorithms.feeding import (
    ForwardFn,
    cached_weights,
    device_of,
    evaluation_mode,
    length_of,
    not_finite,
    to_device,
)
from bnre_exp.errors import UserError, few
from bnre_exp.progress import Progress, no_progress
from bnre_exp.tasks.classification import task_for
from bnre_exp.tasks.task import Evaluation, TargetFn, Task, first_tensor


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataloader: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    task: Task | None = None,
    target_fn: TargetFn | None = None,
    progress: Progress = no_progress,
    description: str = "evaluate",
) -> Evaluation:
    """The metrics of ``model`` over all of ``dataloader``, in evaluation mode; nothing is changed.

    task: what the network is for; None: classification, whose loader yields ``(input, label)`` with label int64
    ``[N]``; ``target_fn(batch)`` returns the labels of other batches. ``forward_fn(model, batch)`` feeds the network
    instead of the task. Raises ``UserError`` for an empty loader, a batch without what the task needs, and outputs
    that are NaN or +inf (−inf may rule a class out).
    """
    task = task_for(task, target_fn)
    device, meter, count = device_of(model), task.meter(), 0
    forward_fn = forward_fn or task.feed
    with evaluation_mode(model), cached_weights(model, forward_fn):
        for batch in progress(dataloader, description, length_of(dataloader)):
            batch = to_device(batch, device)
            count += 1
            output = forward_fn(model, batch)
            _check_finite(task.compared(output), model, batch, f"{description}: batch {count}")
            meter.update(output, batch)
    if not count:
        raise UserError("evaluate: the data loader yields no batches.")
    return meter.compute()


def _check_finite(compared: Tensor, model: nn.Module, batch: Any, where: str) -> None:
    bad = ~(compared < math.inf)
    if not bool(bad.any()):
        return
    names, given = not_finite(model), first_tensor(batch)
    if names:
        cause = f"{few(names)} hold NaN or infinity"
    elif given is not None and not bool(given.isfinite().all()):
        cause = "the batch holds NaN or infinity: look at the data"
    else:
        cause = (
            "weights and batch are finite: look for a division by zero, or for values that their type does not hold, "
            "as too high a learning rate gives"
        )
    raise UserError(
        f"{where}: the network's outputs are not finite ({int(bad.sum())} of {bad.numel()} numbers); {cause}."
    )
