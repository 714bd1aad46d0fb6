"""Do two networks compute the same function?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bnre_exp.algorithms.feeding import (
    ForwardFn,
    cached_weights,
    device_of,
    evaluation_mode,
    length_of,
    to_device,
)
from bnre_exp.errors import UserError, few
from bnre_exp.progress import Progress, no_progress
from bnre_exp.quantsim.sim import bypassed
from bnre_exp.quantsim.whole import parts_of
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
    bypassed; nothing is changed. Of networks that are simulated in parts, compare all tensors that each part gives for
    the inputs that it has in ``first``, and return the largest relative difference of a part.

    A quantizer would turn a difference of float rounding, at a tie, into one of a whole step. Raises ``UserError`` for
    outputs of different shapes, and for a loader without batches, on which nothing would be compared.
    """
    task = Classification() if task is None else task
    forward_fn = forward_fn or task.feed
    if parts_of(first):
        return _compare_parts(first, second, dataloader, forward_fn, progress)
    largest = magnitude = torch.zeros((), dtype=torch.float64)
    device, count = device_of(first), 0
    modes = evaluation_mode(first), evaluation_mode(second), bypassed(first), bypassed(second)
    with modes[0], modes[1], modes[2], modes[3], cached_weights(first, forward_fn):
        for batch in progress(dataloader, "fold: compare outputs", length_of(dataloader)):
            batch = to_device(batch, device)
            outputs = [task.compared(forward_fn(model, batch)) for model in (first, second)]
            count += 1
            largest, magnitude = _with(largest, magnitude, *outputs)
    if not count:
        raise UserError("compare_outputs: the data loader yields no batches.")
    return Difference(float(largest), float(magnitude))


def _with(largest: Tensor, magnitude: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape:
        raise UserError(f"The networks cannot be compared: they give {list(a.shape)} and {list(b.shape)}.")
    if not a.numel():
        return largest, magnitude
    a, b = a.double().cpu(), b.double().cpu()
    return torch.maximum(largest, (a - b).abs().amax()), torch.maximum(magnitude, a.abs().amax())


def _compare_parts(
    first: nn.Module, second: nn.Module, dataloader: Iterable[Any], forward_fn: ForwardFn, progress: Progress
) -> Difference:
    parts, others = parts_of(first), parts_of(second)
    found = dict[str, tuple[Tensor, Tensor]]()
    if not set(parts) <= set(others):
        raise UserError(f"The networks cannot be compared: their parts are {list(parts)} and {list(others)}.")

    def watch(name: str) -> Any:
        def compare(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
            wanted = [x for x in tree_leaves(others[name].forward(*args, **kwargs)) if isinstance(x, Tensor)]
            if len(given) != len(wanted):
                raise UserError(
                    f"The networks cannot be compared: {name} gives {len(given)} and {len(wanted)} tensors."
                )
            for a, b in zip(given, wanted):
                found[name] = _with(*found.get(name, (torch.zeros((), dtype=torch.float64),) * 2), a, b)

        return parts[name].register_forward_hook(compare, with_kwargs=True)

    device, count, handles = device_of(first), 0, [watch(name) for name in parts]
    modes = evaluation_mode(first), evaluation_mode(second), bypassed(first), bypassed(second)
    try:
        with modes[0], modes[1], modes[2], modes[3], cached_weights(first, forward_fn):
            for batch in progress(dataloader, "fold: compare outputs", length_of(dataloader)):
                forward_fn(first, to_device(batch, device))
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise UserError("compare_outputs: the data loader yields no batches.")
    if uncalled := [name for name in parts if name not in found]:
        raise UserError(f"compare_outputs: {few(uncalled)} is not called by the network for any of these batches.")
    return max((Difference(float(a), float(b)) for a, b in found.values()), key=lambda part: part.relative)
