"""Networks of Ultralytics (detect, segment, pose): their own loss, their own non-maximum suppression and metrics."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError
from bnre_exp.tasks.boxes import agreement, image_score, packed
from bnre_exp.tasks.detection import check_objects
from bnre_exp.tasks.task import Evaluation, Headline, first_tensor

KINDS = {  # by the task that a network is of: its headline, and the names of their results
    "detect": (Headline("map", "mAP"), {"map": "metrics/mAP50-95(B)", "map_50": "metrics/mAP50(B)"}),
    "segment": (
        Headline("mask_map", "mask mAP"),
        {"mask_map": "metrics/mAP50-95(M)", "mask_map_50": "metrics/mAP50(M)", "map": "metrics/mAP50-95(B)"},
    ),
    "pose": (
        Headline("pose_map", "pose mAP"),
        {"pose_map": "metrics/mAP50-95(P)", "pose_map_50": "metrics/mAP50(P)", "map": "metrics/mAP50-95(B)"},
    ),
}
LARGEST_SIDE = 4  # masks are measured at a fourth of the images' sides, as theirs are


class Ultralytics:
    """A :class:`~bnre_exp.tasks.task.Task` for a detector, instance segmenter or pose network of Ultralytics.

    Batches are those of this package, ``(images [N, 3, H, W] in [0, 1], targets)``, targets as
    :class:`~bnre_exp.tasks.detection.Detection` takes them (and masks ``[n, H, W]`` or keypoints ``[n, K, 3]``); or
    those of Ultralytics' own loaders, a dict with ``img``, ``cls``, ``bboxes`` and ``batch_idx``.

    model: the network in floating point, whose head tells what it is for; in a job it is given by the runner. The loss
    is the network's own criterion, its parts added, a mean over images. Metrics are those of Ultralytics' validator:
    ``map`` over intersections over union of 0.5 to 0.95, ``map_50``; of masks and poses ``mask_map``, ``pose_map``.
    Without ``model`` in a job, ``begin`` takes it. num_classes: labels are below it.
    """

    targets = "objects"

    def __init__(self, model: nn.Module | None = None, num_classes: int | None = None) -> None:
        self.num_classes, self.headline = num_classes, KINDS["detect"][0]
        self.kind, self._model, self._criterion = "detect", nn.Module(), None
        if model is not None:
            self.begin(model)

    def begin(self, model: nn.Module) -> None:
        """Take the network in floating point, whose criterion is that of its simulations. Raises ``UserError`` for a
        network that is none of Ultralytics', or of another task."""
        head = getattr(model, "model", [None])[-1]  # type: ignore[index]
        if not hasattr(model, "init_criterion") or not hasattr(head, "nc"):
            raise UserError(
                f"task: a {type(model).__name__} is no network of Ultralytics; this task takes their detectors "
                "(model=ultralytics, or YOLO(...).model). For others there is task=detection."
            )
        self.kind = _kind_of(model)
        self.headline = KINDS[self.kind][0]
        self._model, self._criterion = model, None
        model.args = _settings(getattr(model, "args", None), self.kind)  # type: ignore[assignment]

    def feed(self, model: nn.Module, batch: Any) -> Any:
        return model(_images(batch))

    def samples(self, batch: Any) -> int:
        return len(_images(batch))

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        if label_smoothing:
            raise UserError(f"task: label_smoothing={label_smoothing}, but detection has no labels to smooth; set 0.")
        found = first_tensor(output)
        if self._criterion is None and found is not None:
            state = next(self._model.parameters()).device
            self._model.to(found.device)
            self._criterion = self._model.init_criterion()  # type: ignore[operator]
            self._model.to(state)
        if self._criterion is None:
            raise UserError("task: the network returns no tensors.")
        parts, _ = self._criterion(output, theirs(batch, self.kind))
        loss: Tensor = parts.sum() / self.samples(batch)
        return loss

    def meter(self) -> _Meter:
        return _Meter(self)

    def compared(self, output: Any) -> Tensor:
        found = first_tensor(output)
        if found is None:
            raise UserError(f"The network returns {type(output).__name__}, in which no tensor was found.")
        return found

    def agreement(self, first: Tensor, second: Tensor) -> float:
        return agreement(first, second)

    def check_output(self, output: Any, samples: int) -> None:
        found = self.compared(output)
        if found.ndim != 3 or len(found) != samples:
            raise UserError(f"model: the network gives {list(found.shape)}; expected [{samples}, 4 + classes, boxes].")

    def check_labels(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        check_objects(ranges, self.num_classes)

    def validator(self, device: torch.device) -> Any:
        """Ultralytics' validator of the network's task, ready to take in batches."""
        from ultralytics.models.yolo.detect import DetectionValidator
        from ultralytics.models.yolo.pose import PoseValidator
        from ultralytics.models.yolo.segment import SegmentationValidator

        kinds = {"detect": DetectionValidator, "segment": SegmentationValidator, "pose": PoseValidator}
        with tempfile.TemporaryDirectory() as folder:  # it makes one, and writes nothing there
            settings = {"task": self.kind, "plots": False, "save_json": False, "overlap_mask": False, "mode": "val"}
            validator = kinds[self.kind](save_dir=Path(folder), args=settings)
        made: Any = validator
        made.device = device
        made.data = {"val": "", "kpt_shape": list(getattr(self._model.model[-1], "kpt_shape", (0, 3)))}  # type: ignore[index]
        made.init_metrics(self._model)
        return made


def _kind_of(model: Any) -> str:
    kinds = {"Segment": "segment", "Pose": "pose", "OBB": "obb", "Classify": "classify", "RTDETRDecoder": "rtdetr"}
    names = [kind.__name__ for kind in type(model.model[-1]).__mro__]
    kind = next((kinds[name] for name in names if name in kinds), "detect")
    if kind not in KINDS or "Detect" not in names:
        advice = " For classification there is task=classification." if kind == "classify" else ""
        raise UserError(f"task: the network's head is a {names[0]}; this task serves detect, segment and pose.{advice}")
    return kind


def _settings(known: Any, kind: str) -> Any:
    """Hyperparameters of the loss: the network's own, and Ultralytics' defaults for those that it lacks."""
    from ultralytics.cfg import get_cfg

    own = dict(known) if isinstance(known, Mapping) else dict(vars(known)) if known is not None else {}
    settings = get_cfg()
    for name, value in own.items():
        setattr(settings, name, value)
    settings.task, settings.overlap_mask = kind, False  # each object has a mask of its own here
    return settings


def _images(batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        images: Tensor = batch["img"]
        return images if images.is_floating_point() else images.float() / 255
    found = batch[0] if isinstance(batch, (tuple, list)) else batch
    return found  # type: ignore[no-any-return]


def theirs(batch: Any, kind: str) -> dict[str, Any]:
    """A batch as Ultralytics' losses and validators take it: boxes as centre and size, parts of the images' sides."""
    images = _images(batch)
    height, width = images.shape[2:]
    names = {"ori_shape": [(height, width)] * len(images), "ratio_pad": [None] * len(images)}
    extra: dict[str, Any] = {"img": images, **names, "im_file": [str(place) for place in range(len(images))]}
    if isinstance(batch, Mapping):
        return {**batch, **{name: value for name, value in extra.items() if name not in batch or name == "img"}}
    targets, device = batch[1], images.device
    scale = torch.tensor([width, height, width, height], device=device)
    boxes = torch.cat([target["boxes"].to(device) for target in targets]) / scale
    counts = torch.tensor([len(target["boxes"]) for target in targets], device=device)
    made = {
        **extra,
        "batch_idx": torch.arange(len(targets), device=device).repeat_interleave(counts).float(),
        "cls": torch.cat([target["labels"] for target in targets]).to(device).float().reshape(-1, 1),
        "bboxes": torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1),
    }
    if kind != "detect":
        made.update(_masks(targets, (height, width)) if kind == "segment" else _points(targets, scale[:2]))
    return made


def _masks(targets: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    if any("masks" not in target for target in targets if len(target["boxes"])):
        raise UserError("task: the network segments objects, and the dataset gives no masks of them.")
    found = [target["masks"] for target in targets if len(target["boxes"])]
    masks = torch.cat(found).float() if found else torch.zeros(0, *size)
    smaller = (size[0] // LARGEST_SIDE, size[1] // LARGEST_SIDE)
    return {"masks": nn.functional.interpolate(masks[None], smaller, mode="nearest")[0]}


def _points(targets: Any, scale: Tensor) -> dict[str, Tensor]:
    if any("keypoints" not in target for target in targets if len(target["boxes"])):
        raise UserError("task: the network tells poses, and the dataset gives no keypoints of objects.")
    points = torch.cat([target["keypoints"] for target in targets if len(target["boxes"])])
    return {"keypoints": torch.cat([points[..., :2] / scale, 2 * points[..., 2:]], dim=-1)}


class _Meter:
    def __init__(self, task: Ultralytics) -> None:
        self._task, self._validator = task, cast(Any, None)
        self._predictions, self._scores = list[Tensor](), list[float]()

    def update(self, output: Any, batch: Any) -> None:
        if self._validator is None:
            self._validator = self._task.validator(self._task.compared(output).device)
        validator, given = self._validator, theirs(batch, self._task.kind)
        found = validator.postprocess(output)
        validator.update_metrics(found, given)
        predictions = packed([{"boxes": f["bboxes"], "scores": f["conf"], "labels": f["cls"]} for f in found])
        self._predictions.append(predictions)
        for place, image in enumerate(predictions):
            target = validator._prepare_batch(place, given)
            self._scores.append(image_score(image, target["bboxes"].cpu(), target["cls"].cpu()))

    def compute(self) -> Evaluation:
        if self._validator is None:
            raise UserError("evaluate: the batches hold no samples.")
        results, (headline, names) = self._validator.get_stats(), KINDS[self._task.kind]
        metrics = {name: float(results[theirs]) for name, theirs in names.items()}
        scores = torch.tensor(self._scores, dtype=torch.float32)
        return Evaluation(metrics, headline, len(scores), torch.cat(self._predictions), scores)
