"""Classification: one class a sample, told by the largest logit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnre_exp.errors import UserError
from bnre_exp.tasks.logits import classes_of, wide
from bnre_exp.tasks.task import Evaluation, Headline, PairTask, TargetFn, Task, first_tensor

TOP1 = Headline("top1", "top-1")
FEW = 5  # of how many guesses ``top5`` takes the label as found


class Classification(PairTask):
    """A :class:`~bnre_exp.tasks.task.Task`: batches ``(input, label)``, label int64 ``[N]``; logits ``[N, classes]``.

    num_classes: what the network must give; None: any number. target_fn: returns the labels in a batch of another form.

    The loss is cross-entropy [nats]. Metrics: ``top1``, the fraction of samples in [0, 1] whose largest logit is the
    label's; of more than five classes ``top5``, the fraction whose five largest hold it; ``loss``. A prediction is the
    class with the largest logit, int64; its score is 1 if it is the label.
    """

    headline = TOP1
    OUTPUT = "logits [N, classes]"

    def __init__(self, num_classes: int | None = None, target_fn: TargetFn | None = None) -> None:
        super().__init__(target_fn)
        self.num_classes = num_classes

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        logits, labels = wide(self.compared(output)), self.labels(batch)
        labels = labels.to(logits) if _are_probabilities(labels, logits) else classes_of(labels, logits)
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    def meter(self) -> _Meter:
        return _Meter(self)

    def agreement(self, first: Tensor, second: Tensor) -> float:
        return float((first == second).double().mean())

    def check_output(self, output: Any, samples: int) -> None:
        logits, expected = first_tensor(output), [samples, self.num_classes]
        if self.num_classes is None or (logits is not None and list(logits.shape) == expected):
            return
        got = "nothing of tensor type" if logits is None else f"{list(logits.shape)}"
        classes = f"{logits.shape[1]} classes" if logits is not None and logits.ndim == 2 else f"an output {got}"
        raise UserError(
            f"model: the network gives {classes} where the dataset has {self.num_classes} (expected {expected}, got "
            f"{got}). Set its class count in model.kwargs, replace its last layer with model.replace_head=true, or "
            "correct dataset.num_classes."
        )

    def check_labels(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        for split, (low, high) in ranges.items():
            if low < 0 or (self.num_classes is not None and high >= self.num_classes):
                way_out = f"Set dataset.num_classes={high + 1}." if low >= 0 else "Number them from 0."
                raise UserError(
                    f"dataset.num_classes={self.num_classes}: the {split} images have classes from {low} to {high}; "
                    f"expected 0 to {(self.num_classes or high + 1) - 1}. {way_out}"
                )


def task_for(task: Task | None, target_fn: TargetFn | None) -> Task:
    """The task, or classification where there is none. Raises ``UserError`` if both say where labels are."""
    if task is None:
        return Classification(target_fn=target_fn)
    if target_fn is not None:
        raise UserError(
            "task and target_fn are both given, but a task says itself where labels are: give "
            "Classification(target_fn=...) alone, or let your task find them."
        )
    return task


def _are_probabilities(labels: Any, logits: Tensor) -> bool:
    is_float = isinstance(labels, Tensor) and labels.is_floating_point()
    return is_float and labels.shape == logits.shape and logits.ndim > 1


class _Meter:
    def __init__(self, task: Classification) -> None:
        self._task = task
        self._losses, self._predictions, self._scores = list[Tensor](), list[Tensor](), list[Tensor]()
        self._among_few = list[Tensor]()

    def update(self, output: Any, batch: Any) -> None:
        labels, logits = self._task.labels(batch), wide(self._task.compared(output))
        labels = classes_of(labels, logits)
        if logits.ndim != 2:
            raise UserError(
                f"The network gives an output {list(logits.shape)}; classification expects logits [N, classes]. For "
                "another task pass task=..., as docs/your_network.md shows."
            )
        predicted = logits.argmax(dim=1)
        self._losses.append(F.cross_entropy(logits, labels, reduction="sum").double())
        self._predictions.append(predicted)
        self._scores.append((predicted == labels).float())
        if logits.shape[1] > FEW:
            self._among_few.append((logits.topk(FEW, dim=1).indices == labels[:, None]).sum())

    def compute(self) -> Evaluation:
        predictions, scores = torch.cat(self._predictions).cpu(), torch.cat(self._scores).cpu()
        if not len(scores):
            raise UserError("evaluate: the batches hold no samples.")
        loss = sum(torch.stack(self._losses).tolist())
        metrics = {TOP1.name: int(scores.sum(dtype=torch.float64)) / len(scores), "loss": loss / len(scores)}
        if self._among_few:
            metrics["top5"] = sum(torch.stack(self._among_few).tolist()) / len(scores)
        return Evaluation(metrics, TOP1, len(scores), predictions, scores)
