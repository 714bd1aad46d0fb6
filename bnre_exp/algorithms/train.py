"""One training loop, for FP32 training and for quantization-aware training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp.algorithms.evaluate import evaluate
from bnre_exp.algorithms.feeding import (
    ForwardFn,
    as_many,
    device_of,
    is_whole,
    length_of,
    not_finite,
    patience,
    take_batches,
    to_device,
)
from bnre_exp.algorithms.recipe import Recipe, build_optimizer, build_scheduler
from bnre_exp.algorithms.snapshot import Snapshots, Training, capture, restore, restore_random
from bnre_exp.algorithms.speed import autocast, compiled
from bnre_exp.errors import TrainingDivergedError, UserError, few
from bnre_exp.progress import Progress, no_progress
from bnre_exp.quantsim.tracing.frozen import train_mode
from bnre_exp.tasks.classification import Classification, task_for
from bnre_exp.tasks.task import TargetFn, Task, labels_of

logger = logging.getLogger(__name__)
LossFn = Callable[[Any, Tensor], Tensor]
LossOfBatch = Callable[[Any, str], tuple[Tensor, int]]


@dataclass(frozen=True)
class Epoch:
    """One epoch: index from 1, mean training loss, learning rate at its end, seconds of training, and the metrics of
    the validation data by name, also as attributes: ``epoch.val_loss`` (None without validation data)."""

    epoch: int
    loss: float
    lr: float
    seconds: float
    validation: Mapping[str, float] | None = None

    def __getattr__(self, name: str) -> float | None:
        metric = name.removeprefix("val_")
        metrics = self.__dict__.get("validation")
        if metric == name or (metrics is not None and metric not in metrics):
            raise AttributeError(f"an epoch has no {name!r}")
        return None if metrics is None else metrics[metric]

    def as_json(self) -> dict[str, Any]:
        """All of it as one flat dict, ``val_…`` for the validation data's."""
        own = {name: getattr(self, name) for name in ("epoch", "loss", "lr", "seconds")}
        return {**own, **{f"val_{name}": value for name, value in (self.validation or {}).items()}}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Epoch:
        """The inverse of :meth:`as_json`."""
        scores = {name.removeprefix("val_"): v for name, v in values.items() if name.startswith("val_")}
        own = {name: value for name, value in values.items() if not name.startswith("val_")}
        return Epoch(**own, validation=scores if any(v is not None for v in scores.values()) else None)


def train(
    model: nn.Module, dataloader: Iterable[Any], epochs: int, *, lr: float = 0.01, optimizer: str = "sgd",
    momentum: float = 0.9, weight_decay: float = 0.0, schedule: str = "cosine", label_smoothing: float = 0.0,
    precision: str = "float32", compile: bool = False, steps_per_epoch: int | None = None,
    validation: Iterable[Any] | None = None, forward_fn: ForwardFn | None = None, target_fn: TargetFn | None = None,
    loss_fn: LossFn | None = None, task: Task | None = None, on_epoch: Callable[[Epoch], None] | None = None,
    progress: Progress = no_progress, description: str = "train", snapshots: Snapshots | None = None,
) -> list[Epoch]:  # fmt: skip
    """Train in place for ``epochs`` passes over ``dataloader``.

    lr: its peak; schedule: "one_cycle", "cosine" or "constant", by batches. optimizer: "sgd" (Nesterov) or "adamw".
    weight_decay acts on weights of two or more axes only: never on BN parameters, biases or quantizer scales.
    precision: "bfloat16" computes under autocast; compile: by torch.compile; both also where the validation data
    are evaluated. steps_per_epoch: an epoch is that many batches from the loader's start, iterated again where it is
    shorter; None: all of it, whose length every schedule but a constant one needs.
    task: None: classification, whose loader yields ``(input, label)``; ``forward_fn(model, batch)`` replaces its
    feeding, ``target_fn(batch)`` returns the labels of other batches, validation included, and ``loss_fn(output,
    label)`` replaces its loss with ``label_smoothing``. ``on_epoch`` is called after every epoch. The model is left in
    evaluation mode. Frozen BNs (``bn.eval()``) stay so.

    snapshots: saved to after every epoch. From a snapshot that is there the training goes on, with the same bits on the
    CPU if data and functions are as before; ``on_epoch`` is first called for its epochs, and the history has all.

    Raises :class:`~bnre_exp.errors.TrainingDivergedError` when the loss, or a weight after an epoch, is not finite;
    ``UserError`` for a setting that makes no sense, where gradients are off, for a loader without a length (if that is
    needed), with another than it says, or without batches, for a batch whose labels are not clear, and for a snapshot
    that does not fit (the model is then as it was) or cannot be made.
    """
    recipe = Recipe(epochs, lr, optimizer, momentum, weight_decay, schedule, label_smoothing, precision)
    task, loss_of = _loss_of_batch(model, recipe, task, forward_fn, target_fn, loss_fn)
    batches_an_epoch = _count(dataloader, recipe, steps_per_epoch)
    training = _start(model, recipe, batches_an_epoch, {"training": dataloader, "validation": validation})
    history = _resume(training, snapshots, on_epoch) if snapshots is not None else []
    unused = frozenset(not_finite(model))  # as scales of quantizers that are bypassed, or the first loss will tell
    _name_frozen(model, description)

    def validate() -> Mapping[str, float] | None:
        if validation is None:
            return None
        how: dict[str, Any] = {
            "precision": recipe.precision,
            "compile": compile,
            "description": f"{description}: validation",
        }
        return evaluate(model, validation, forward_fn, task=task, **how).metrics

    for epoch in range(len(history) + 1, recipe.epochs + 1):
        started = time.perf_counter()
        batches = _epoch_batches(dataloader, recipe, steps_per_epoch)
        batches = progress(batches, f"{description} {epoch}/{epochs}", batches_an_epoch)
        with compiled(model, compile):
            loss = _train_epoch(training, batches, loss_of, unused, f"epoch {epoch}", description)
        rate, seconds = training.optimizer.param_groups[0]["lr"], time.perf_counter() - started
        history.append(Epoch(epoch, loss, rate, seconds, validate()))
        if snapshots is not None:
            snapshots.save(capture(training, [done.as_json() for done in history]))
        if on_epoch is not None:
            on_epoch(history[-1])
    model.eval()
    return history


def _count(dataloader: Iterable[Any], recipe: Recipe, steps_per_epoch: int | None) -> int | None:
    """Batches an epoch, None where that is open and need not be known. Raises ``UserError`` if there are none."""
    if steps_per_epoch is not None:
        if not is_whole(steps_per_epoch) or steps_per_epoch < 1:
            raise UserError(f"steps_per_epoch={steps_per_epoch!r}: expected a whole number of at least 1.")
        return int(steps_per_epoch)
    length = length_of(dataloader)
    if length == 0:
        raise UserError("train: the data loader must have a length of at least one batch.")
    if length is None and recipe.schedule != "constant":
        raise UserError(
            f"train: the data loader has no length, which schedule={recipe.schedule!r} needs; pass steps_per_epoch (an "
            'epoch is that many batches), or schedule="constant".'
        )
    return length


def _epoch_batches(dataloader: Iterable[Any], recipe: Recipe, steps_per_epoch: int | None) -> Iterable[Any]:
    """The batches of an epoch: as many as the schedule was made for."""
    if steps_per_epoch is not None:
        return take_batches(dataloader, int(steps_per_epoch))
    length = length_of(dataloader)
    return dataloader if length is None or recipe.schedule == "constant" else as_many(dataloader, length)


def _start(model: nn.Module, recipe: Recipe, batches_an_epoch: int | None, loaders: Mapping[str, Any]) -> Training:
    """A training that has not begun. Raises ``UserError`` where nothing can be trained."""
    if not torch.is_grad_enabled():
        raise UserError("train is called under torch.no_grad or torch.inference_mode; call it outside of that.")
    optimizer = build_optimizer(model, recipe)
    steps = None if batches_an_epoch is None else recipe.epochs * batches_an_epoch
    settings = {**asdict(recipe), "batches an epoch": batches_an_epoch, "device": device_of(model).type}
    return Training(model, optimizer, build_scheduler(optimizer, recipe, steps), loaders, settings)


def _name_frozen(model: nn.Module, description: str) -> None:
    """Warn of batch norms that stay frozen: a network may be in evaluation mode without its user having meant that."""
    bns = {module: name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    frozen = [bns[module] for module in train_mode(model) if module in bns]
    if frozen:
        logger.warning(
            "%s: %d of %d batch norms stay frozen, since they are in evaluation mode within a network in training mode "
            "(%s%s); model.train() before would train them as well",
            description, len(frozen), len(bns), ", ".join(frozen[:3]), ", ..." if len(frozen) > 3 else "",
        )  # fmt: skip


def _resume(training: Training, snapshots: Snapshots, on_epoch: Callable[[Epoch], None] | None) -> list[Epoch]:
    """Put the snapshot back, if there is one, and report its epochs, which are returned."""
    snapshot = snapshots.load()
    if snapshot is None:
        capture(training, [])  # what cannot be captured is refused now, not after an epoch
        return []
    restore(training, snapshot)
    history = [Epoch.from_json(values) for values in snapshot.values["history"]]
    if on_epoch is None:
        return history
    for epoch in history:
        # Should on_epoch draw random numbers, then what it drew for the last epoch alone came after the snapshot.
        restore_random(training, snapshot)
        on_epoch(epoch)
    return history


def _train_epoch(
    training: Training, batches: Iterable[Any], loss_of: LossOfBatch, unused: Set[str], epoch: str, description: str
) -> float:
    """One pass over ``batches``; the mean loss of its samples. unused: what was not finite before."""
    train_mode(training.model)
    total, samples = torch.zeros((), dtype=torch.float64, device=device_of(training.model)), 0
    peak, every = f"it was {training.settings['lr']:g} at its peak", patience(total.device)
    for step, batch in enumerate(batches, start=1):
        loss, count = loss_of(batch, f"{epoch}, batch {step} of {description}")
        training.optimizer.zero_grad(set_to_none=True)
        total += loss.detach().double() * count
        if step % every == 0:
            _refuse_diverged(total, f"{epoch}, batch {step} of {description}", peak)
        loss.backward()
        training.optimizer.step()
        training.scheduler.step()
        samples += count
    if not samples:
        raise UserError(
            f"{description}: the data loader yields no batches in {epoch}; give one that can be iterated again."
        )
    _refuse_diverged(total, f"{epoch} of {description}", peak)
    if names := [name for name in not_finite(training.model) if name not in unused]:
        raise TrainingDivergedError(
            f"After {epoch} of {description} {few(names)} hold NaN or infinity, though the loss was finite: its "
            f"gradient was not. Try a lower learning rate ({peak}), or look for a square root or a division at zero."
        )
    return float(total) / samples


def _refuse_diverged(total: Tensor, where: str, peak: str) -> None:
    """Raise if the losses that were added up are not finite."""
    if not math.isfinite(value := float(total)):
        raise TrainingDivergedError(
            f"The training loss became {value} in {where}; try a lower learning rate ({peak}) or look at the data."
        )


def _loss_of_batch(
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
