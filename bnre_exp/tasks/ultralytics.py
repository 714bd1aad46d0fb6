"""Networks of Ultralytics (detect, segment, pose): their own loss, their own non-maximum suppression and metrics."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError
from bnre_exp.files import work_folder
from bnre_exp.tasks.boxes import agreement, image_score, packed
from bnre_exp.tasks.detection import check_objects
from bnre_exp.tasks.task import Evaluation, Headline, first_tensor, refuse_smoothing
from bnre_exp.tasks.ultralytics_batch import images_of, one_image, theirs

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


class Ultralytics:
    """A :class:`~bnre_exp.tasks.task.Task` for a detector, instance segmenter or pose network of Ultralytics.

    Batches are those of this package, ``(images [N, 3, H, W] in [0, 1], targets)``, targets as
    :class:`~bnre_exp.tasks.detection.Detection` takes them (and masks ``[n, H, W]`` or keypoints ``[n, K, 3]``); or
    those of Ultralytics' own loaders, a dict with ``img``, ``cls``, ``bboxes`` and ``batch_idx``.

    model: the network in floating point, whose head tells what it is for; in a job it is given by the runner. The loss
    is the network's own criterion, its parts added, a mean over images. YOLOv10 and YOLO26 have two heads, whose losses
    it adds, weighed 0.8 and 0.2. Ultralytics' trainer calls its ``update`` each epoch, which moves these to 0.1 and
    0.9; here they stay, since a task knows no epochs. The second head gives no gradient to the rest, so that this only
    scales learning rates; it matters where the second is what evaluates (``model.end2end``).

    Metrics are those of Ultralytics' validator: ``map`` over intersections over union of 0.5 to 0.95, ``map_50``; of
    masks and poses ``mask_map``, ``pose_map``. Without ``model`` in a job, ``begin`` takes it. num_classes: labels are
    below it.
    """

    targets = "objects"

    def __init__(self, model: nn.Module | None = None, num_classes: int | None = None) -> None:
        self.num_classes, self.headline = num_classes, KINDS["detect"][0]
        self.kind, self._model, self._criteria = "detect", cast(Any, None), dict[torch.device, Any]()
        if model is not None:
            self.begin(model)

    def begin(self, model: nn.Module) -> None:
        """Take the network in floating point, whose criterion is that of its simulations. Raises ``UserError`` for a
        network that is none of Ultralytics', or of another task."""
        if not hasattr(model, "init_criterion") or not isinstance(getattr(model, "model", None), nn.Sequential):
            raise UserError(
                f"task: a {type(model).__name__} is no network of Ultralytics; this task takes their detectors "
                "(model=ultralytics, or YOLO(...).model). For others there is task=detection."
            )
        self.kind = _kind_of(model)
        self.headline = KINDS[self.kind][0]
        self._model, self._criteria = model, {}

    def feed(self, model: nn.Module, batch: Any) -> Any:
        return model(images_of(batch))

    def samples(self, batch: Any) -> int:
        return len(images_of(batch))

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        refuse_smoothing(label_smoothing)
        criterion = self._criterion(self.compared(output).device)
        parts, _ = criterion(output, self.theirs(batch))
        loss: Tensor = parts.sum() / self.samples(batch)
        return loss

    def _criterion(self, device: torch.device) -> Any:
        """The network's criterion on a device; made from a copy, since its settings are not the network's own."""
        if device not in self._criteria:
            model = self._network()
            home, likeness = next(model.parameters()).device, copy.copy(model)
            likeness.args = _settings(getattr(model, "args", None), self.kind)
            model.to(device)  # whose tensors the copy shares
            self._criteria[device] = likeness.init_criterion()
            model.to(home)
        return self._criteria[device]

    def theirs(self, batch: Any) -> dict[str, Any]:
        """A batch as the network's criterion and validator take it."""
        return theirs(batch, self.kind, self._keypoint_shape()[0])

    def _keypoint_shape(self) -> list[int]:
        """How many keypoints an object has, and how many numbers each: x, y and perhaps whether it is seen."""
        return list(getattr(self._network().model[-1], "kpt_shape", (0, 3)))

    def _network(self) -> Any:
        if self._model is None:
            raise UserError(
                "task: Ultralytics needs the network in floating point: Ultralytics(model), or begin(model)."
            )
        return self._model

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
        with work_folder() as folder:  # it makes one, and writes nothing there
            settings = {"task": self.kind, "plots": False, "save_json": False, "overlap_mask": False, "mode": "val"}
            validator = kinds[self.kind](save_dir=folder, args=settings)
        made: Any = validator
        made.device = device
        made.data = {"val": "", "kpt_shape": self._keypoint_shape()}
        known = self._network()
        made.init_metrics(SimpleNamespace(names=known.names, end2end=getattr(known, "end2end", False)))
        return made


def _kind_of(model: Any) -> str:
    kinds = {"Segment": "segment", "Pose": "pose", "OBB": "obb", "Classify": "classify", "ClassLogits": "classify"}
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
    vars(settings).update(own, task=kind, overlap_mask=False)  # each object has a mask of its own here
    return settings


class _Meter:
    def __init__(self, task: Ultralytics) -> None:
        self._task, self._validator = task, cast(Any, None)
        self._predictions, self._scores, self._objects = list[Tensor](), list[float](), 0

    def update(self, output: Any, batch: Any) -> None:
        if self._validator is None:
            self._validator = self._task.validator(self._task.compared(output).device)
        validator, given = self._validator, self._task.theirs(batch)
        # Image by image: of a batch, their non-maximum suppression leaves out the last images once it has taken long.
        images = [one_image(output, place) for place in range(self._task.samples(batch))]
        found = [validator.postprocess(image)[0] for image in images]
        validator.update_metrics(found, given)
        predictions = packed([{"boxes": f["bboxes"], "scores": f["conf"], "labels": f["cls"]} for f in found])
        self._predictions.append(predictions)
        for place, image in enumerate(predictions):
            target = validator._prepare_batch(place, given)
            self._objects += len(target["cls"])
            self._scores.append(image_score(image, target["bboxes"].cpu(), target["cls"].cpu()))

    def compute(self) -> Evaluation:
        if self._validator is None:
            raise UserError("evaluate: the batches hold no samples.")
        if not self._objects:
            raise UserError("evaluate: no image has an object; mAP is not defined then.")
        results, (headline, names) = self._validator.get_stats(), KINDS[self._task.kind]
        metrics = {name: float(results[theirs]) for name, theirs in names.items()}
        scores = torch.tensor(self._scores, dtype=torch.float32)
        return Evaluation(metrics, headline, len(scores), torch.cat(self._predictions), scores)
