"""Do two networks compute the same function?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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
from bnre_exp.quantsim.sim import bypassed
from bnre_exp.tasks.classification import Classification
from bnre_exp.tasks.task import Task


@dataclass(frozen=True)
class Difference:
    """largest: the largest absolute difference of two numbers; magnitude: the largest absolute number of the first
    network; relative: the one divided by the other. Numbers that are not finite make them so."""

    largest: float
    magnitude: float

    @property
    def relative(self) -> float:
        return self.largest / self.magnitude if self.magnitude > 0 else self.largest


@torch.no_grad()
def compare_outputs(
    first: nn.Module,
    second: nn.Module,
    dataloader: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    task: Task | None = None,
    progress: Progress = no_progress,
) -> Difference:
    """Compare outputs, by the tensor that the task names, over all of ``dataloader`` with activation quantizers
    bypassed; nothing is changed.

    A quantizer would turn a difference of float rounding, at a tie, into one of a whole step. Raises ``UserError`` for
    outputs of different shapes, and for a loader without batches, on which nothing would be compared.
    """
    task = Classification() if task is None else task
    forward_fn = forward_fn or task.feed
    largest = magnitude = torch.zeros((), dtype=torch.float64)
    device, count = device_of(first), 0
    modes = evaluation_mode(first), evaluation_mode(second), bypassed(first), bypassed(second)
    with modes[0], modes[1], modes[2], modes[3], cached_weights(first, forward_fn):
        for batch in progress(dataloader, "fold: compare outputs", length_of(dataloader)):
            batch = to_device(batch, device)
            a, b = (task.compared(forward_fn(model, batch)).double().cpu() for model in (first, second))
            if a.shape != b.shape:
                raise UserError(f"The networks cannot be compared: they give {list(a.shape)} and {list(b.shape)}.")
            count += 1
            largest = torch.maximum(largest, (a - b).abs().amax())
            magnitude = torch.maximum(magnitude, a.abs().amax())
    if not count:
        raise UserError("compare_outputs: the data loader yields no batches.")
    return Difference(float(largest), float(magnitude))
