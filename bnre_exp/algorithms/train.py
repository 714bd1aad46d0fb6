"""One training loop, for FP32 training and for quantization-aware training."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnre_exp.algorithms.evaluate import evaluate
from bnre_exp.algorithms.feeding import ForwardFn, device_of, to_device
from bnre_exp.algorithms.snapshot import Snapshots, Training, capture, restore, restore_random
from bnre_exp.errors import TrainingDivergedError, UserError
from bnre_exp.progress import Progress, no_progress
from bnre_exp.quantsim.tracing.frozen import train_mode
from bnre_exp.tasks.classification import Classification
from bnre_exp.tasks.task import Task

LossFn = Callable[[Any, Tensor], Tensor]


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
    model: nn.Module,
    dataloader: Iterable[Any],
    epochs: int,
    *,
    lr: float = 0.01,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    label_smoothing: float = 0.0,
    precision: str = "float32",
    validation: Iterable[Any] | None = None,
    forward_fn: ForwardFn | None = None,
    loss_fn: LossFn | None = None,
    task: Task | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    progress: Progress = no_progress,
    description: str = "train",
    snapshots: Snapshots | None = None,
) -> list[Epoch]:
    """Train in place for ``epochs`` passes over ``dataloader``, which has a length.

    lr: its peak; schedule: "one_cycle", "cosine" or "constant", by batches. optimizer: "sgd" (Nesterov) or "adamw".
    weight_decay acts on weights of two or more axes only: never on BN parameters, biases or quantizer scales.
    precision: "bfloat16" computes under autocast. task: None: classification, whose loader yields ``(input, label)``;
    ``forward_fn(model, batch)`` replaces its feeding, ``loss_fn(output, label)`` its loss with ``label_smoothing``.
    ``on_epoch`` is called after every epoch. The model is left in evaluation mode. Frozen BNs (``bn.eval()``) stay so.

    snapshots: saved to after every epoch. From a snapshot that is there the training goes on, with the same bits on the
    CPU if data and functions are as before; ``on_epoch`` is first called for its epochs, and the history has all.

    Raises :class:`~bnre_exp.errors.TrainingDivergedError` when the loss is not finite, ``UserError`` for a loader
    without a length or batches, and for a snapshot that does not fit (the model is then as it was) or cannot be made.
    """
    batches_an_epoch = _count(dataloader, epochs)
    optimize = _optimizer(model, optimizer, lr, momentum, weight_decay)
    scheduler = _scheduler(optimize, schedule, lr, epochs * batches_an_epoch)
    task = Classification() if task is None else task
    loss_of = _loss_of_batch(model, precision, task, forward_fn, loss_fn, label_smoothing)
    settings = {
        "epochs": epochs, "batches an epoch": batches_an_epoch, "lr": lr, "optimizer": optimizer, "momentum": momentum,
        "weight_decay": weight_decay, "schedule": schedule, "label_smoothing": label_smoothing, "precision": precision,
        "device": device_of(model).type,
    }  # fmt: skip
    training = Training(model, optimize, scheduler, {"training": dataloader, "validation": validation}, settings)
    history = _resume(training, snapshots, on_epoch) if snapshots is not None else []
    for epoch in range(len(history) + 1, epochs + 1):
        started = time.perf_counter()
        batches = progress(dataloader, f"{description} {epoch}/{epochs}", batches_an_epoch)
        loss = _train_epoch(training, batches, loss_of, task, epoch, description)
        rate, seconds = optimize.param_groups[0]["lr"], time.perf_counter() - started
        score = None if validation is None else evaluate(model, validation, forward_fn, task=task).metrics
        history.append(Epoch(epoch, loss, rate, seconds, score))
        if snapshots is not None:
            snapshots.save(capture(training, [done.as_json() for done in history]))
        if on_epoch is not None:
            on_epoch(history[-1])
    model.eval()
    return history


def _count(dataloader: Iterable[Any], epochs: int) -> int:
    """Batches an epoch. Raises ``UserError`` if there are none, or no epochs."""
    if epochs < 1:
        raise UserError(f"epochs={epochs}: expected at least 1; to leave training out, do not call it.")
    if not isinstance(dataloader, Sized) or len(dataloader) == 0:
        raise UserError("train: the data loader must have a length of at least one batch.")
    return len(dataloader)


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
    training: Training, batches: Iterable[Any], loss_of: Callable[[Any], Tensor], task: Task, epoch: int,
    description: str,
) -> float:  # fmt: skip
    """One pass over ``batches``; the mean loss of its samples."""
    train_mode(training.model)
    total, samples = torch.zeros((), dtype=torch.float64, device=device_of(training.model)), 0
    for step, batch in enumerate(batches, start=1):
        loss = loss_of(batch)
        training.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(float(loss.detach())):
            raise TrainingDivergedError(
                f"The training loss became {float(loss.detach())} in epoch {epoch}, batch {step} of {description}; try "
                f"a lower learning rate (it was {training.settings['lr']:g} at its peak) or look at the data."
            )
        loss.backward()
        training.optimizer.step()
        training.scheduler.step()
        total += loss.detach().double() * task.samples(batch)
        samples += task.samples(batch)
    return float(total) / samples


def _loss_of_batch(
    model: nn.Module, precision: str, task: Task, forward_fn: ForwardFn | None, loss_fn: LossFn | None,
    label_smoothing: float,
) -> Callable[[Any], Tensor]:  # fmt: skip
    device, forward_fn = device_of(model), forward_fn or task.feed

    def loss_of(batch: Any) -> Tensor:
        batch = to_device(batch, device)
        with _autocast(device, precision):
            output = forward_fn(model, batch)
            return task.loss(output, batch, label_smoothing) if loss_fn is None else loss_fn(output, batch[1])

    return loss_of


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _optimizer(model: nn.Module, name: str, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    raise UserError(f"optimizer={name!r}: expected sgd or adamw.")


def _scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, lr: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.25, cycle_momentum=False)
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    raise UserError(f"schedule={schedule!r}: expected one_cycle, cosine or constant.")
