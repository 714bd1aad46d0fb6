"""Segmentation: one class a pixel, told by the largest logit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnre_exp.errors import UserError
from bnre_exp.tasks.logits import classes_of, wide
from bnre_exp.tasks.task import Evaluation, Headline, PairTask, TargetFn, first_tensor

MIOU = Headline("miou", "mIoU")
LOSSES = ("cross_entropy", "dice_cross_entropy")


class Segmentation(PairTask):
    """A :class:`~bnre_exp.tasks.task.Task`: batches ``(input, mask)``, mask int64 ``[N, H, W]``; logits
    ``[N, classes, h, w]``, the first tensor of the output, which are resized to the mask where they are smaller.

    num_classes: what the network must give. ignore_index: the mask's value for pixels that do not count. loss:
    "cross_entropy" [nats a pixel], or "dice_cross_entropy", to which one minus the mean over classes of the soft Dice
    coefficient is added. target_fn: returns the mask in a batch of another form.

    Metrics, by torchmetrics: ``miou``, the mean over classes of intersection over union, over all pixels, of classes
    that are in a mask or were predicted; ``pixel_accuracy``, the fraction of pixels that are right; ``loss``. A
    prediction is a class a pixel, ``[H, W]``; its score is the fraction of its pixels that are right, 1 where none
    counts. All images have the same size.
    """

    headline = MIOU
    OUTPUT = "logits [N, classes, H, W]"
    targets = "mask"

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None = 255,
        loss: str = "cross_entropy",
        target_fn: TargetFn | None = None,
    ) -> None:
        super().__init__(target_fn)
        if not isinstance(num_classes, int) or num_classes < 2:
            raise UserError(
                f"task: num_classes={num_classes!r}; segmentation needs at least 2, background included. Set "
                "dataset.num_classes, or name the classes in order: +dataset.kwargs.classes=[background,road,car]."
            )
        if loss not in LOSSES:
            raise UserError(f"task: loss={loss!r}; expected one of {', '.join(LOSSES)}.")
        self.num_classes, self.ignore_index, self.loss_name = num_classes, ignore_index, loss

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        logits, mask = self.logits_and_mask(output, batch)
        ignored = -100 if self.ignore_index is None else self.ignore_index
        loss = F.cross_entropy(logits, mask, ignore_index=ignored, label_smoothing=label_smoothing)
        if self.loss_name == "dice_cross_entropy":
            loss = loss + self._dice_loss(logits, mask)
        return loss if bool((mask != ignored).any()) else logits.sum() * 0  # the mean over no pixels is NaN

    def _dice_loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        counts = torch.ones_like(mask, dtype=torch.bool) if self.ignore_index is None else mask != self.ignore_index
        wanted = F.one_hot(torch.where(counts, mask, 0), logits.shape[1]).movedim(-1, 1) * counts.unsqueeze(1)
        given = logits.softmax(1) * counts.unsqueeze(1)
        axes = [0, *range(2, logits.ndim)]
        both, each = (given * wanted).sum(axes), given.sum(axes) + wanted.sum(axes)
        return 1 - ((2 * both + 1) / (each + 1)).mean()

    def logits_and_mask(self, output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits in the mask's size, and the mask. Raises ``UserError`` where they do not fit each other."""
        logits, mask = wide(self.compared(output)), self.labels(batch)
        if logits.ndim != 4 or logits.shape[1] != self.num_classes:
            raise UserError(
                f"The network gives an output {list(logits.shape)}; segmentation expects logits "
                f"[N, {self.num_classes}, H, W]."
            )
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1:
            mask = mask.squeeze(1)
        if isinstance(mask, Tensor) and mask.ndim == 3 and mask.shape[1:] != logits.shape[2:]:
            logits = F.interpolate(logits, size=mask.shape[1:], mode="bilinear", align_corners=False)
        return logits, classes_of(mask, logits, self.ignore_index)

    def meter(self) -> _Meter:
        return _Meter(self)

    def agreement(self, first: Tensor, second: Tensor) -> float:
        return float((first == second).double().mean())

    def check_output(self, output: Any, samples: int) -> None:
        logits = first_tensor(output)
        got = "nothing of tensor type" if logits is None else f"{list(logits.shape)}"
        if logits is None or logits.ndim != 4 or list(logits.shape[:2]) != [samples, self.num_classes]:
            raise UserError(
                f"model: the network gives {got}; segmentation into {self.num_classes} classes expects logits "
                f"[{samples}, {self.num_classes}, H, W]."
            )

    def check_labels(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        if ranges and not any(high for _, high in ranges.values()):
            raise UserError(
                f"task: the masks have no class but 0{self._but_ignored()}. Write classes as 0, 1, 2, and not as 255."
            )
        for split, (low, high) in ranges.items():
            if low < 0 or (high >= self.num_classes and high != self.ignore_index):
                raise UserError(
                    f"task: the {split} masks have classes from {low} to {high}; expected 0 to {self.num_classes - 1}"
                    f"{self._but_ignored()}."
                )

    def _but_ignored(self) -> str:
        return "" if self.ignore_index is None else f", and {self.ignore_index} for pixels that do not count"


class _Meter:
    def __init__(self, task: Segmentation) -> None:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        self._task = task
        how: dict[str, Any] = {"num_classes": task.num_classes, "ignore_index": task.ignore_index}
        self._metrics = {
            "miou": MulticlassJaccardIndex(average="macro", **how),
            "pixel_accuracy": MulticlassAccuracy(average="micro", **how),
        }
        self._losses, self._predictions, self._scores = list[Tensor](), list[Tensor](), list[Tensor]()

    def update(self, output: Any, batch: Any) -> None:
        logits, mask = self._task.logits_and_mask(output, batch)
        predicted = logits.argmax(1)
        for metric in self._metrics.values():
            metric.to(logits.device).update(predicted, mask)
        counts = torch.ones_like(mask) if self._task.ignore_index is None else mask != self._task.ignore_index
        right = ((predicted == mask) & counts.bool()).flatten(1).sum(1).double()
        self._losses.append(self._task.loss(output, batch).double() * len(mask))
        self._scores.append(torch.where(counts.flatten(1).any(1), right / counts.flatten(1).sum(1), 1.0))
        self._predictions.append(predicted.to(torch.uint8 if self._task.num_classes <= 256 else torch.int64).cpu())

    def compute(self) -> Evaluation:
        shapes = {tuple(predicted.shape[1:]) for predicted in self._predictions}
        if len(shapes) > 1:
            raise UserError(
                f"evaluate: masks of {len(shapes)} sizes; segmentation is measured on images of one size. Resize or "
                "crop them in the dataset."
            )
        predictions, scores = torch.cat(self._predictions), torch.cat(self._scores).float().cpu()
        if not len(scores):
            raise UserError("evaluate: the batches hold no samples.")
        metrics = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        metrics["loss"] = float(torch.stack(self._losses).sum()) / len(scores)
        return Evaluation(metrics, MIOU, len(scores), predictions, scores)
