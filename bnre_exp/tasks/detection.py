"""Detection: boxes of objects with their classes, as torchvision's detectors give them, or a user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError
from bnre_exp.tasks.boxes import Detections, agreement, image_score, packed
from bnre_exp.tasks.task import Evaluation, Headline, first_tensor, labels_of, refuse_smoothing

MAP = Headline("map", "mAP")
WITH_BACKGROUND = ("GeneralizedRCNN", "SSD")  # torchvision's detectors whose class 0 is no object
NEEDED = ("boxes", "labels", "scores")

DecodeFn = Callable[[Any, Any], Sequence[Detections]]
LossFn = Callable[[Any, Any], Tensor]


class Detection:
    """A :class:`~bnre_exp.tasks.task.Task`: batches ``(images [N, C, H, W], targets)``, targets a list of N dicts with
    boxes ``[n, 4]`` (x1, y1, x2, y2 [pixels]) and labels int64 ``[n]``, from 0.

    A network is called as torchvision's detectors are: in training mode with images and targets, and returns a dict of
    losses, whose sum is the loss; in evaluation mode with images, and returns a list of dicts with boxes, labels and
    scores. A network that is called with images alone is served by two functions: ``decode_fn(output, batch)`` returns
    that list, and ``loss_fn(output, batch)`` the loss. num_classes: labels are below it. background: whether the
    network's class 0 is no object, so that its classes count from 1; None: as torchvision's classes have it, or as the
    network says in ``class_labels``, its label of each class; others that it gives are no detections then.

    Metrics, by torchmetrics: ``map``, COCO's mean average precision over intersections over union of 0.5 to 0.95, and
    ``map_50``, ``map_75`` and ``mar_100``. A prediction is the 100 best detections, ``[100, 6]``; its score is the
    average precision of its image at an intersection over union of 0.5.
    """

    headline = MAP
    targets = "objects"

    def __init__(
        self,
        num_classes: int | None = None,
        background: bool | None = None,
        decode_fn: DecodeFn | None = None,
        loss_fn: LossFn | None = None,
    ) -> None:
        self.num_classes, self.background = num_classes, background
        self.decode_fn, self.loss_fn = decode_fn, loss_fn
        self._first = int(bool(background))  # the number of the network's first class
        self._labels: tuple[int, ...] | None = None  # of all its classes, where it names them

    def feed(self, model: nn.Module, batch: Any) -> Any:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if self.decode_fn is not None:
            return model(images)
        if self.background is None:
            self._labels = getattr(model, "class_labels", None)
            self._first = int(any(kind.__name__ in WITH_BACKGROUND for kind in type(model).__mro__))
        if not model.training:
            return model(list(images))
        targets = [{**target, "labels": self._as_theirs(target["labels"])} for target in self._targets(batch)]
        return model(list(images), targets)

    def _as_theirs(self, labels: Tensor) -> Tensor:
        return (
            labels + self._first if self._labels is None else torch.tensor(self._labels, device=labels.device)[labels]
        )

    def _as_ours(self, image: Detections) -> Detections:
        """An image's detections with classes from 0; those of no class are gone."""
        given = image["labels"]
        if self._labels is None:
            found = given - self._first
        else:
            classes = torch.full((max(int(given.max()) if len(given) else 0, *self._labels) + 1,), -1)
            classes[list(self._labels)] = torch.arange(len(self._labels))
            found = classes.to(given.device)[given]
        return {name: (found if name == "labels" else image[name])[found >= 0] for name in NEEDED}

    def _targets(self, batch: Any) -> list[Mapping[str, Tensor]]:
        targets = objects_of(batch)
        labels = torch.cat([target["labels"] for target in targets])
        low, high = torch.stack(labels.aminmax()).tolist() if len(labels) else (0, 0)
        count = self.num_classes if self._labels is None else len(self._labels)
        if low < 0 or (count is not None and high >= count):
            raise UserError(
                f"The objects of a batch have classes from {low} to {high}; expected 0 to {(count or high + 1) - 1}. "
                "Number them from 0, or give the network as many."
            )
        return targets

    def samples(self, batch: Any) -> int:
        return len(batch[0])

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        refuse_smoothing(label_smoothing)
        if self.loss_fn is not None:
            return self.loss_fn(output, batch)
        losses = list(output.values()) if isinstance(output, Mapping) else []
        if not losses or not all(isinstance(loss, Tensor) and loss.ndim == 0 for loss in losses):
            raise UserError(
                f"In training mode the network returns {_kind_of(output)}; detection expects a dict of losses, as "
                "torchvision's detectors return it. For another network pass Detection(loss_fn=..., decode_fn=...)."
            )
        return torch.stack(losses).sum()

    def detections(self, output: Any, batch: Any) -> list[Detections]:
        """What was found in each image, with labels from 0. Raises ``UserError`` where the output is something else."""
        found = output if self.decode_fn is None else self.decode_fn(output, batch)
        fits = isinstance(found, (tuple, list)) and all(
            isinstance(image, Mapping) and set(NEEDED) <= set(image) for image in found
        )
        if not fits:
            raise UserError(
                f"The network returns {_kind_of(found)}; detection expects a list of dicts with {', '.join(NEEDED)}, "
                "as torchvision's detectors return it. For another network pass Detection(decode_fn=..., loss_fn=...)."
            )
        return [self._as_ours(image) for image in found]

    def meter(self) -> _Meter:
        return _Meter(self)

    def compared(self, output: Any) -> Tensor:
        """Of detections, their scores and boxes; of raw outputs, the first tensor."""
        if isinstance(output, (tuple, list)) and output and all(isinstance(image, Mapping) for image in output):
            return torch.cat([torch.cat([image["boxes"], image["scores"][:, None]], dim=1) for image in output])
        found = first_tensor(output)
        if found is None:
            raise UserError(f"The network returns {_kind_of(output)}; expected detections, or a tensor.")
        return found

    def agreement(self, first: Tensor, second: Tensor) -> float:
        return agreement(first, second)

    def check_output(self, output: Any, samples: int) -> None:
        if self.decode_fn is None and len(self.detections(output, None)) != samples:
            raise UserError(f"model: the network gives detections of {len(output)} images for {samples} of them.")

    def check_labels(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        check_objects(ranges, self.num_classes)


def objects_of(batch: Any) -> list[Mapping[str, Tensor]]:
    """The targets of a batch, one an image. Raises ``UserError`` unless they are dicts with boxes and labels."""
    targets = labels_of(batch)
    fits = isinstance(targets, (tuple, list)) and all(
        isinstance(target, Mapping) and {"boxes", "labels"} <= set(target) for target in targets
    )
    if not fits or len(targets) != len(batch[0]):
        raise UserError(
            f"The targets of a batch are {_kind_of(targets)}; detection expects a list of dicts with boxes and "
            "labels, one an image."
        )
    return list(targets)


def check_objects(ranges: Mapping[str, tuple[int, int]], num_classes: int | None) -> None:
    """Raise ``UserError`` where a split has no objects, or classes from ``num_classes`` on."""
    for split in ("train", "test"):
        if split not in ranges:
            raise UserError(f"dataset: the {split} images have no objects (boxes); look at the annotations.")
    for split, (low, high) in ranges.items():
        if low < 0 or (num_classes is not None and high >= num_classes):
            raise UserError(
                f"task: the {split} objects have classes from {low} to {high}; expected 0 to "
                f"{(num_classes or high + 1) - 1} (dataset.num_classes={num_classes})."
            )


def _kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(str, list(value)[:6]))}"
    return f"a {type(value).__name__}"


class _Meter:
    def __init__(self, task: Detection) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        self._task = task
        self._map = MeanAveragePrecision(iou_type="bbox")
        self._map.warn_on_many_detections = False
        self._predictions, self._scores = list[Tensor](), list[float]()

    def update(self, output: Any, batch: Any) -> None:
        found = [_on_cpu(image) for image in self._task.detections(output, batch)]
        targets = [_on_cpu({n: target[n] for n in ("boxes", "labels")}) for target in self._task._targets(batch)]
        self._map.update(found, targets)
        predictions = packed(found)
        self._predictions.append(predictions)
        self._scores += [image_score(p, t["boxes"], t["labels"]) for p, t in zip(predictions, targets)]

    def compute(self) -> Evaluation:
        if not self._scores:
            raise UserError("evaluate: the batches hold no samples.")
        computed = self._map.compute()
        metrics = {name: float(computed[name]) for name in ("map", "map_50", "map_75", "mar_100")}
        if metrics["map"] < 0:
            raise UserError("evaluate: no image has an object; mAP is not defined then.")
        return Evaluation(
            metrics,
            MAP,
            len(self._scores),
            torch.cat(self._predictions),
            torch.tensor(self._scores, dtype=torch.float32),
        )


def _on_cpu(image: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in image.items()}
