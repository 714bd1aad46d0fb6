"""One training loop, for FP32 training and for quantization-aware training."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnre_exp.algorithms.averaging import Average
from bnre_exp.algorithms.batch_loss import LossFn, LossOfBatch, loss_of_batch
from bnre_exp.algorithms.control import (
    Control,
    Watch,
    averaged,
    batch_norms,
    tensors_of,
    write_average,
)
from bnre_exp.algorithms.epoch import Epoch
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
)
from bnre_exp.algorithms.recipe import Recipe, build_optimizer, build_scheduler
from bnre_exp.algorithms.snapshot import Snapshots, Training, capture, restore, restore_random
from bnre_exp.algorithms.speed import compiled
from bnre_exp.errors import TrainingDivergedError, UserError, few
from bnre_exp.progress import Progress, no_progress
from bnre_exp.quantsim.tracing.frozen import train_mode
from bnre_exp.tasks.task import TargetFn, Task

logger = logging.getLogger(__name__)
Undo = contextlib.AbstractContextManager[Any]


def train(
    model: nn.Module, dataloader: Iterable[Any], epochs: int, *, lr: float = 0.01, optimizer: str = "sgd",
    momentum: float = 0.9, weight_decay: float = 0.0, schedule: str = "cosine", label_smoothing: float = 0.0,
    precision: str = "float32", compile: bool = False, steps_per_epoch: int | None = None,
    freeze_bn_epoch: int | None = None, bn_momentum: float | None = None, ema_decay: float | None = None,
    oscillations: Watch | None = None, validation: Iterable[Any] | None = None,
    before_validation: Callable[[nn.Module], Undo] | None = None, forward_fn: ForwardFn | None = None,
    target_fn: TargetFn | None = None, loss_fn: LossFn | None = None, task: Task | None = None,
    on_epoch: Callable[[Epoch], None] | None = None, progress: Progress = no_progress, description: str = "train",
    snapshots: Snapshots | None = None,
) -> list[Epoch]:  # fmt: skip
    """Train in place for ``epochs`` passes over ``dataloader``.

    lr: its peak; schedule: "one_cycle", "cosine" or "constant", by batches. optimizer: "sgd" (Nesterov) or "adamw".
    weight_decay acts on weights of two or more axes only: never on BN parameters, biases or quantizer scales.
    precision: "bfloat16" computes under autocast; compile: by torch.compile; both also where the validation data
    are evaluated. steps_per_epoch: an epoch is that many batches from the loader's start, iterated again where it is
    shorter; None: all of it, whose length every schedule but a constant one needs.
    freeze_bn_epoch: from this epoch on (1: the first) BNs normalize by their running statistics and leave them; frozen
    BNs (``bn.eval()``) always do. bn_momentum: of all BNs meanwhile. ema_decay: the model ends with, and is validated
    with, the moving average of what is trained (statistics of BNs are not averaged: re-estimate them). oscillations:
    from :func:`~bnre_exp.track_oscillations`; the loss that is reported is without its dampening.
    task: None: classification, whose loader yields ``(input, label)``; ``forward_fn(model, batch)`` replaces its
    feeding, ``target_fn(batch)`` returns the labels of other batches, validation included, and ``loss_fn(output,
    label)`` replaces its loss with ``label_smoothing``. ``on_epoch`` is called after every epoch, and around validation
    ``before_validation(model)``, whose result undoes it, as the handle of ``reestimate_bn_stats`` does. The model is
    left in evaluation mode.
    snapshots: saved to after every epoch. From a snapshot that is there the training goes on, with the same bits on the
    CPU if data and functions are as before; ``on_epoch`` is first called for its epochs, and the history has all.

    Raises :class:`~bnre_exp.errors.TrainingDivergedError` when the loss, or a weight after an epoch, is not finite;
    ``UserError`` for a setting that makes no sense, where gradients are off, for a loader without a length (if that is
    needed), with another than it says, or without batches, for a batch whose labels are not clear, and for a snapshot
    that does not fit (the model is then as it was) or cannot be made.
    """
    recipe = Recipe(epochs, lr, optimizer, momentum, weight_decay, schedule, label_smoothing, precision)
    control = Control(freeze_bn_epoch, bn_momentum, ema_decay, oscillations)
    task, loss_of = loss_of_batch(model, recipe, task, forward_fn, target_fn, loss_fn)
    each = _count(dataloader, recipe, steps_per_epoch)
    run = _start(model, recipe, control, each, {"training": dataloader, "validation": validation})
    history = _resume(run.training, snapshots, on_epoch) if snapshots is not None else []
    unused = frozenset(not_finite(model))  # as scales of quantizers that are bypassed, or the first loss will tell
    _name_frozen(model, description)
    how: dict[str, Any] = {"task": task, "precision": precision, "compile": compile}
    for number in range(len(history) + 1, recipe.epochs + 1):
        batches = _epoch_batches(dataloader, run, steps_per_epoch)
        batches = progress(batches, f"{description} {number}/{epochs}", each)
        epoch = _train_epoch(run, number, batches, loss_of, unused, description, compile)
        with averaged(run.average, oscillations):
            scores = _validate(model, validation, before_validation, forward_fn, f"{description}: validation", how)
        history.append(replace(epoch, validation=scores))
        if snapshots is not None:
            snapshots.save(capture(run.training, [done.as_json() for done in history]))
        if on_epoch is not None:
            on_epoch(history[-1])
    write_average(run.average, oscillations)
    model.eval()
    return history


@dataclass(frozen=True)
class _Run:
    """A training, what it does besides following gradients, and how many steps it has (None: not known)."""

    training: Training
    control: Control
    average: Average | None
    steps: int | None

    def progress(self) -> float:
        """The part of all steps that is done with the next one; 1 where their number is not known."""
        return 1.0 if self.steps is None else (self.training.scheduler.last_epoch + 1) / self.steps


def _validate(
    model: nn.Module, data: Iterable[Any] | None, before: Callable[[nn.Module], Undo] | None,
    forward_fn: ForwardFn | None, description: str, how: Mapping[str, Any],
) -> Mapping[str, float] | None:  # fmt: skip
    """The metrics of the validation data, if there are any. before: what is done to the network, and undone after."""
    if data is None:
        return None
    with contextlib.nullcontext() if before is None else before(model):
        return evaluate(model, data, forward_fn, description=description, **how).metrics


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


def _epoch_batches(dataloader: Iterable[Any], run: _Run, steps_per_epoch: int | None) -> Iterable[Any]:
    """The batches of an epoch: as many as the schedules were made for."""
    if steps_per_epoch is not None:
        return take_batches(dataloader, int(steps_per_epoch))
    is_scheduled = run.training.settings["schedule"] != "constant" or run.control.needs_end
    length = length_of(dataloader)
    return as_many(dataloader, length) if is_scheduled and length is not None else dataloader


def _start(
    model: nn.Module, recipe: Recipe, control: Control, batches_an_epoch: int | None, loaders: Mapping[str, Any]
) -> _Run:
    """A training that has not begun. Raises ``UserError`` where nothing can be trained."""
    if not torch.is_grad_enabled():
        raise UserError("train is called under torch.no_grad or torch.inference_mode; call it outside of that.")
    optimizer = build_optimizer(model, recipe)
    steps = None if batches_an_epoch is None else recipe.epochs * batches_an_epoch
    control.check_steps(steps)
    settings = {**asdict(recipe), "batches an epoch": batches_an_epoch, "device": device_of(model).type}
    settings.update(control.settings())
    average, scheduler = control.average(model), build_scheduler(optimizer, recipe, steps)
    more = tensors_of(average, control.oscillations)
    return _Run(Training(model, optimizer, scheduler, loaders, settings, more), control, average, steps)


def _name_frozen(model: nn.Module, description: str) -> None:
    """Warn of batch norms that stay frozen: a network may be in evaluation mode without its user having meant that."""
    ours = set(batch_norms(model))
    bns = {module: name for name, module in model.named_modules() if module in ours}
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
    run: _Run, number: int, batches: Iterable[Any], loss_of: LossOfBatch, unused: Set[str], description: str,
    compile: bool,
) -> Epoch:  # fmt: skip
    """One pass over ``batches``; with the mean loss of its samples. unused: what was not finite before."""
    training, epoch, started = run.training, f"epoch {number}", time.perf_counter()
    train_mode(training.model)
    total, samples = torch.zeros((), dtype=torch.float64, device=device_of(training.model)), 0
    peak, every = f"it was {training.settings['lr']:g} at its peak", patience(total.device)
    with compiled(training.model, compile), run.control.of_batch_norms(training.model, number):
        for step, batch in enumerate(batches, start=1):
            loss, count = loss_of(batch, f"{epoch}, batch {step} of {description}")
            training.optimizer.zero_grad(set_to_none=True)
            total += loss.detach().double() * count
            if step % every == 0:
                _refuse_diverged(total, f"{epoch}, batch {step} of {description}", peak)
            loss.backward()
            _take_step(run)
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
    watch, rate = run.control.oscillations, training.optimizer.param_groups[0]["lr"]
    shares = None if watch is None else watch.shares()
    return Epoch(number, float(total) / samples, rate, time.perf_counter() - started, shares=shares)


def _take_step(run: _Run) -> None:
    """A step of the optimizer, and what is done before and after each."""
    watch, progress = run.control.oscillations, run.progress()
    if watch is not None:
        watch.before_step(progress)
    run.training.optimizer.step()
    run.training.scheduler.step()
    if watch is not None:
        watch.after_step(progress)
    if run.average is not None:
        run.average.add()


def _refuse_diverged(total: Tensor, where: str, peak: str) -> None:
    """Raise if the losses that were added up are not finite."""
    if not math.isfinite(value := float(total)):
        raise TrainingDivergedError(
            f"The training loss became {value} in {where}; try a lower learning rate ({peak}) or look at the data."
        )
