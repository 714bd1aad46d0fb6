"""One training loop, for FP32 training and for quantization-aware training."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnre_exp.errors import TrainingDivergedError, UserError
from bnre_exp.progress import Progress, no_progress
from bnre_exp.stages.evaluate import evaluate, logits_of
from bnre_exp.stages.inputs import ForwardFn, device_of, feed

LossFn = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Epoch:
    """One epoch: index from 1, mean training loss [nats], learning rate at its end, seconds of training, and top-1 and
    loss on the validation data (None without any)."""

    epoch: int
    loss: float
    lr: float
    seconds: float
    val_top1: Optional[float]
    val_loss: Optional[float]


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
    validation: Optional[Iterable[Any]] = None,
    forward_fn: Optional[ForwardFn] = None,
    loss_fn: Optional[LossFn] = None,
    on_epoch: Optional[Callable[[Epoch], None]] = None,
    progress: Progress = no_progress,
    description: str = "train",
) -> list[Epoch]:
    """Train in place for ``epochs`` passes over ``dataloader``, which has a length and yields ``(input, label)``.

    lr: peak learning rate; schedule: "one_cycle", "cosine" or "constant", stepped every batch. optimizer: "sgd" (with
    ``momentum``, Nesterov) or "adamw". weight_decay acts on weights of two or more axes only: never on BN parameters,
    biases or quantizer scales. precision: "bfloat16" computes under autocast. loss_fn(output, label) replaces
    cross-entropy with ``label_smoothing``. ``on_epoch`` is called after every epoch. The model is left in
    evaluation mode.

    Raises :class:`~bnre_exp.errors.TrainingDivergedError` when the loss is not finite, ``UserError`` for a loader
    without a length or batches.
    """
    if epochs < 1:
        raise UserError(f"epochs={epochs}: expected at least 1; to leave training out, do not call it.")
    if not isinstance(dataloader, Sized) or len(dataloader) == 0:
        raise UserError("train: the data loader must have a length of at least one batch.")
    steps = epochs * len(dataloader)
    optimize = _optimizer(model, optimizer, lr, momentum, weight_decay)
    scheduler = _scheduler(optimize, schedule, lr, steps)
    loss_fn = loss_fn or (lambda output, label: _loss(output, label, label_smoothing))
    device = device_of(model)
    history = []
    for epoch in range(1, epochs + 1):
        model.train()
        started, total, samples = time.perf_counter(), torch.zeros((), dtype=torch.float64, device=device), 0
        name = f"{description} {epoch}/{epochs}"
        for step, batch in enumerate(progress(dataloader, name, len(dataloader)), start=1):
            label = batch[1].to(device)
            with _autocast(device, precision):
                loss = loss_fn(feed(model, batch, device, forward_fn), label)
            optimize.zero_grad(set_to_none=True)
            if not math.isfinite(float(loss.detach())):
                raise TrainingDivergedError(
                    f"The training loss became {float(loss.detach())} in epoch {epoch}, batch {step} of {description}; "
                    f"try a lower learning rate (it was {lr:g} at its peak) or look at the data."
                )
            loss.backward()
            optimize.step()
            scheduler.step()
            total += loss.detach().double() * len(label)
            samples += len(label)
        seconds = time.perf_counter() - started
        score = evaluate(model, validation, forward_fn) if validation is not None else None
        history.append(
            Epoch(
                epoch,
                float(total) / samples,
                optimize.param_groups[0]["lr"],
                seconds,
                score.top1 if score else None,
                score.loss if score else None,
            )  # fmt: skip
        )
        if on_epoch is not None:
            on_epoch(history[-1])
    model.eval()
    return history


def _loss(output: Any, label: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits_of(output).float(), label, label_smoothing=label_smoothing)


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
