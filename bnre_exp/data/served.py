"""Which kinds of targets the datasets that come along have, where they have them whatever the task takes."""

from __future__ import annotations

from typing import Any

from bnre_exp.data.annotations import coco, yolo_folder
from bnre_exp.data.datasets import cifar10, cifar100, digits, fashion_mnist, image_folder, imagenet
from bnre_exp.data.pairs import image_masks, image_pairs
from bnre_exp.data.samples import CLASS
from bnre_exp.errors import UserError

_CLASSES = (digits, fashion_mnist, cifar10, cifar100, image_folder, imagenet)
_SERVED: dict[Any, str] = {
    **dict.fromkeys(_CLASSES, CLASS), image_masks: "mask", image_pairs: "image", coco: "objects",
    yolo_folder: "objects",
}  # fmt: skip
_TASKS = {
    CLASS: "classification", "mask": "segmentation", "image": "regression", "objects": "detection or task=ultralytics",
    "keypoints": "keypoints",
}  # fmt: skip


def check_served(dataset: Any, targets: str) -> None:
    """Raise ``UserError`` where a dataset is known to have other targets than the task takes."""
    served = _SERVED.get(dataset, targets)
    if targets not in (served, "any"):
        raise UserError(
            f"dataset {dataset.__name__} has targets of the kind {served!r}, and the task takes {targets!r}: set "
            f"task={_TASKS[served]}, or choose a dataset for task={_TASKS[targets]} (docs/tasks.md lists them)."
        )
