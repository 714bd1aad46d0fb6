"""The loss of a batch in training, as the task or the user computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bnre_exp.algorithms.feeding import ForwardFn, device_of, to_device
from bnre_exp.algorithms.recipe import Recipe
from bnre_exp.algorithms.speed import autocast
from bnre_exp.errors import UserError
from bnre_exp.tasks.classification import Classification, task_for
from bnre_exp.tasks.task import TargetFn, Task, labels_of

LossFn = Callable[[Any, Tensor], Tensor]
LossOfBatch = Callable[[Any, str], tuple[Tensor, int]]


def loss_of_batch(
    model: nn.Module, recipe: Recipe, task: Task | None, forward_fn: ForwardFn | None, target_fn: TargetFn | None,
    loss_fn: LossFn | None,
) -> tuple[Task, LossOfBatch]:  # fmt: skip
    """The task, and what gives a batch's loss and its number of samples."""
    device, task = device_of(model), task_for(task, target_fn)
    forward_fn = forward_fn or task.feed
    labels = task.labels if isinstance(task, Classification) else labels_of

    def loss_of(batch: Any, where: str) -> tuple[Tensor, int]:
        batch = to_device(batch, device)
        count = task.samples(batch)
        if not count:
            raise UserError(f"{where}: the batch has no samples.")
        with autocast(device, recipe.precision):
            output = _forward(forward_fn, model, batch, where)
            if loss_fn is None:
                loss = task.loss(output, batch, recipe.label_smoothing)
            else:
                loss = loss_fn(output, labels(batch))
        _check_loss(loss, where)
        return loss, count

    return task, loss_of


def _forward(forward_fn: ForwardFn, model: nn.Module, batch: Any, where: str) -> Any:
    try:
        return forward_fn(model, batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"{where}: a batch norm gets one value per channel, which has no variance; use larger batches "
            "(drop_last=True drops a short last one)."
        ) from error


def _check_loss(loss: Any, where: str) -> None:
    """Raise ``UserError`` unless this is one number that a gradient can be taken of."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = list(loss.shape) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise UserError(f"{where}: the loss is {got}; expected a tensor of one number, the mean over the batch.")
    if not loss.requires_grad:
        raise UserError(
            f"{where}: the loss does not depend on what is trained; forward_fn, loss_fn or the network may compute "
            "under torch.no_grad or detach its output."
        )
