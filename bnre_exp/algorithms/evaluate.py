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
    patience,
    to_device,
)
from bnre_exp.algorithms.speed import autocast, check_precision, compiled
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
    precision: str = "float32",
    compile: bool = False,
    progress: Progress = no_progress,
    description: str = "evaluate",
) -> Evaluation:
    """The metrics of ``model`` over all of ``dataloader``, in evaluation mode; nothing is changed.

    task: what the network is for; None: classification, whose loader yields ``(input, label)`` with label int64
    ``[N]``; ``target_fn(batch)`` returns the labels of other batches. ``forward_fn(model, batch)`` feeds the network
    instead of the task. precision: "bfloat16" computes under autocast; compile: by torch.compile.

    Raises ``UserError`` for an empty loader, a batch without what the task needs, and outputs that are NaN or +inf
    (−inf may rule a class out).
    """
    task = task_for(task, target_fn)
    device, meter, count = device_of(model), task.meter(), 0
    forward_fn, checks = forward_fn or task.feed, _Checks(model, description, patience(device))
    check_precision(precision)
    with evaluation_mode(model), cached_weights(model, forward_fn), compiled(model, compile):
        for batch in progress(dataloader, description, length_of(dataloader)):
            batch = to_device(batch, device)
            count += 1
            with autocast(device, precision):
                output = forward_fn(model, batch)
            checks.note(task.compared(output), batch)
            meter.update(output, batch)
    checks.look()
    if not count:
        raise UserError("evaluate: the data loader yields no batches.")
    return meter.compute()


class _Checks:
    """Whether a network's outputs are finite, batch by batch, looked at every few batches."""

    def __init__(self, model: nn.Module, description: str, every: int) -> None:
        self.model, self.description, self.every = model, description, every
        self.seen = 0  # batches before those that are noted
        self.noted: list[Tensor] = []  # of each batch: numbers that are not finite, all numbers, whether the input is

    def note(self, compared: Tensor, batch: Any) -> None:
        bad, given = (~(compared < math.inf)).sum(), first_tensor(batch)
        is_given_finite = torch.ones_like(bad) if given is None else given.isfinite().all().to(bad)
        self.noted.append(torch.stack([bad, torch.full_like(bad, compared.numel()), is_given_finite]))
        if len(self.noted) == self.every:
            self.look()

    def look(self) -> None:
        """Raise ``UserError`` naming the first batch of those noted whose outputs are not finite."""
        rows = torch.stack(self.noted).tolist() if self.noted else []
        for number, (bad, count, is_given_finite) in enumerate(rows, self.seen + 1):
            if bad:
                raise UserError(
                    f"{self.description}: batch {number}: the network's outputs are not finite ({bad} of {count} "
                    f"numbers); {self._cause(bool(is_given_finite))}."
                )
        self.seen += len(rows)
        self.noted.clear()

    def _cause(self, is_given_finite: bool) -> str:
        if names := not_finite(self.model):
            return f"{few(names)} hold NaN or infinity"
        if not is_given_finite:
            return "the batch holds NaN or infinity: look at the data"
        return (
            "weights and batch are finite: look for a division by zero, or for values that their type does not hold, "
            "as too high a learning rate gives"
        )
