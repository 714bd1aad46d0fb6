"""Evaluation of a network by its task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bnre_exp.algorithms.feeding import (
    ForwardFn,
    cached_weights,
    device_of,
    evaluation_mode,
    length_of,
    to_device,
)
from bnre_exp.errors import UserError
from bnre_exp.progress import Progress, no_progress
from bnre_exp.tasks.classification import Classification
from bnre_exp.tasks.task import Evaluation, Task


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataloader: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    task: Task | None = None,
    progress: Progress = no_progress,
    description: str = "evaluate",
) -> Evaluation:
    """The metrics of ``model`` over all of ``dataloader``, in evaluation mode; nothing is changed.

    task: what the network is for; None: classification, whose loader yields ``(input, label)`` with label int64
    ``[N]``. ``forward_fn(model, batch)`` feeds the network instead of the task. Raises ``UserError`` for an empty
    loader or a batch without what the task needs.
    """
    task = Classification() if task is None else task
    device, meter, count = device_of(model), task.meter(), 0
    forward_fn = forward_fn or task.feed
    with evaluation_mode(model), cached_weights(model, forward_fn):
        for batch in progress(dataloader, description, length_of(dataloader)):
            batch = to_device(batch, device)
            meter.update(forward_fn(model, batch), batch)
            count += 1
    if not count:
        raise UserError("evaluate: the data loader yields no batches.")
    return meter.compute()
