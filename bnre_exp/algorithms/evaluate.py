"""Evaluation of a classifier."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnre_exp.algorithms.feeding import (
    ForwardFn,
    cached_weights,
    device_of,
    evaluation_mode,
    feed,
    length_of,
    logits_of,
)
from bnre_exp.errors import UserError
from bnre_exp.progress import Progress, no_progress


@dataclass(frozen=True)
class Evaluation:
    """Sums over a data set divided by its size.

    top1: fraction of samples in [0, 1] whose largest logit is the label's; loss: mean cross-entropy [nats];
    count: samples; predictions: class with the largest logit, ``[count]`` int64 on the CPU.
    """

    top1: float
    loss: float
    count: int
    predictions: Tensor


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataloader: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    progress: Progress = no_progress,
    description: str = "evaluate",
) -> Evaluation:
    """Top-1 and cross-entropy of ``model`` over all of ``dataloader``, in evaluation mode; nothing is changed.

    dataloader: yields ``(input, label)``, label int64 ``[N]``. Raises ``UserError`` for an empty loader or a batch
    without labels.
    """
    device = device_of(model)
    correct, loss, predictions = 0, 0.0, []
    with evaluation_mode(model), cached_weights(model if forward_fn is None else nn.Identity()):
        for batch in progress(dataloader, description, length_of(dataloader)):
            if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                raise UserError("evaluate: every batch must be (input, label); this loader yields no labels.")
            logits = logits_of(feed(model, batch, device, forward_fn)).float()
            labels = batch[1].to(device)
            predicted = logits.argmax(dim=1)
            correct += int((predicted == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum").double())
            predictions.append(predicted.cpu())
    if not predictions:
        raise UserError("evaluate: the data loader yields no batches.")
    every = torch.cat(predictions)
    return Evaluation(correct / len(every), loss / len(every), len(every), every)
