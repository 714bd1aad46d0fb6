"""Images whose targets are masks, objects, points or other images: read, checked, put into batches.

A sample is a dict: ``image`` and the entries of its target, as torchvision's tv_tensors, so that its transforms move
all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import tv_tensors

from bnre_exp.data.preprocess import to_uint8
from bnre_exp.errors import UserError, first_line

Sample = dict[str, Any]
IGNORED = 255  # of a mask: a pixel that does not count


@dataclass(frozen=True)
class TargetKind:
    """What a task takes as the target of an image.

    fit: how images come into their size, unless a configuration says otherwise (``Preprocessing.fit``); read: the
    entries of a sample that an item's target gives, for an image of a height and width; collate: the targets of a
    batch; labels: the classes of a sample's target, int64 ``[n]``; None where it has none.
    """

    name: str
    fit: str
    expected: str
    read: Callable[[Any, tuple[int, int]], Sample]
    collate: Callable[[Sequence[Sample]], Any]
    labels: Callable[[Sample], Tensor] | None = None

    def labels_of(self, sample: Sample) -> Tensor:
        """The classes of a sample's target, int64 ``[n]``; none where it has none."""
        return torch.zeros(0, dtype=torch.int64) if self.labels is None else self.labels(sample)


def read_sample(item: Any, kind: TargetKind, num_classes: int | None) -> Sample:
    """An item ``(image, target)`` of a dataset. Raises ``UserError`` where it is something else, or has a class of
    ``num_classes`` or above (None: any)."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise UserError(f"it is a {type(item).__name__}; expected a pair (image, {kind.expected})")
    image = to_uint8(item[0])
    size = int(image.shape[-2]), int(image.shape[-1])
    return {"image": tv_tensors.Image(image), **read_target(item[1], size, kind, num_classes)}


def read_target(target: Any, size: tuple[int, int], kind: TargetKind, num_classes: int | None) -> Sample:
    """The entries of a sample that a target gives, for an image of height and width ``size``. Raises ``UserError`` as
    :func:`read_sample`."""
    sample = kind.read(target, size)
    labels = kind.labels_of(sample)
    if len(labels) and (int(labels.min()) < 0 or (num_classes is not None and int(labels.max()) >= num_classes)):
        most = "any above" if num_classes is None else str(num_classes - 1)
        raise UserError(
            f"its classes go from {int(labels.min())} to {int(labels.max())}; expected 0 to {most} "
            f"(dataset.num_classes={num_classes})"
        )
    return sample


def _tensor(value: Any, what: str) -> Tensor:
    """A tensor, array, PIL image (turned as its EXIF data say), or nested list of numbers, as a plain tensor."""
    if isinstance(value, Image.Image):
        value = np.array(ImageOps.exif_transpose(value))
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the type of its {what} is {type(value).__name__}; expected numbers") from error
    return found.as_subclass(Tensor)


def _integers(value: Any, what: str, or_bool: bool = False) -> Tensor:
    found = _tensor(value, what)
    is_wrong = found.is_floating_point() or found.is_complex() or (found.dtype == torch.bool and not or_bool)
    if found.numel() and is_wrong:
        raise UserError(f"the type of its {what} is {found.dtype}; expected integers")
    return found.to(torch.int64)


def _read_mask(value: Any, size: tuple[int, int]) -> Sample:
    if isinstance(value, Image.Image) and value.mode not in ("1", "L", "P", "I", "I;16"):
        raise UserError(f"its mask is a picture of mode {value.mode}; expected one class a pixel: mode L or P")
    mask = _integers(value, "mask", or_bool=True)
    mask = mask.squeeze(0) if mask.ndim == 3 and len(mask) == 1 else mask
    if tuple(mask.shape) != size:
        raise UserError(f"its mask is {list(mask.shape)}; expected {list(size)}, as the image")
    if mask.numel() and not 0 <= int(mask.min()) <= int(mask.max()) <= IGNORED:
        raise UserError(f"its mask goes from {int(mask.min())} to {int(mask.max())}; expected 0 to {IGNORED}")
    return {"mask": tv_tensors.Mask(mask.to(torch.uint8))}


def _mask_classes(sample: Sample) -> Tensor:
    found = sample["mask"].as_subclass(Tensor).unique().long()
    return found[found != IGNORED]


def _collate_masks(samples: Sequence[Sample]) -> Tensor:
    return torch.stack([sample["mask"].as_subclass(Tensor) for sample in samples]).long()


def _read_picture(value: Any, size: tuple[int, int]) -> Sample:
    try:
        return {"target": tv_tensors.Image(to_uint8(value))}
    except UserError as error:
        raise UserError(f"its target: {str(error).removeprefix('dataset: ')}") from error


def _stacked(parts: Sequence[Tensor], what: str) -> Tensor:
    """The targets of a batch as one tensor. Raises ``UserError`` where they are of several shapes."""
    shapes = [list(shape) for shape in dict.fromkeys(part.shape for part in parts)]
    if len(shapes) > 1:
        raise UserError(f"dataset: the {what} of a batch are {shapes[0]} and {shapes[1]}; expected one shape for all.")
    return torch.stack(list(parts))


def _collate_pictures(samples: Sequence[Sample]) -> Tensor:
    return _stacked([sample["target"].as_subclass(Tensor) for sample in samples], "target images").float() / 255


def _points(value: Any, shape: str, ndim: int, size: tuple[int, int]) -> Sample:
    """Points ``[..., 2 or 3]`` of an image of a height and width, as entries of a sample: coordinates ``[..., 2]``
    [pixels], and whether they are seen ``[...]``."""
    found = _tensor(value, "keypoints").to(torch.float32)
    if found.ndim != ndim or found.shape[-1] not in (2, 3):
        raise UserError(f"its keypoints are {list(found.shape)}; expected {shape}: x, y [pixels], whether it is seen")
    if not found.isfinite().all():
        raise UserError("its keypoints are not all finite; expected any numbers for those that are not seen, such as 0")
    points, seen = found[..., :2], torch.ones(found.shape[:-1], dtype=torch.bool)
    seen = _inside(points, size) & (found[..., 2] > 0 if found.shape[-1] == 3 else seen)
    return {"keypoints": tv_tensors.KeyPoints(points, canvas_size=size), "seen": seen}


def _inside(points: Tensor, size: Sequence[int]) -> Tensor:
    return ((points >= 0) & (points < torch.tensor([size[1], size[0]]))).all(-1)


def _read_keypoints(value: Any, size: tuple[int, int]) -> Sample:
    return _points(value, "[K, 2] or [K, 3]", 2, size)


def _keypoints(sample: Sample) -> Tensor:
    points = sample["keypoints"].as_subclass(Tensor)
    seen = sample["seen"] & _inside(points, sample["image"].shape[-2:])
    return torch.cat([points, seen.unsqueeze(-1)], dim=-1)


def _collate_keypoints(samples: Sequence[Sample]) -> Tensor:
    return _stacked([_keypoints(sample) for sample in samples], "keypoints")


def _read_objects(value: Any, size: tuple[int, int]) -> Sample:
    if not isinstance(value, Mapping) or not {"boxes", "labels"} <= set(value):
        raise UserError(f"its target is a {type(value).__name__} without boxes and labels; expected a dict of them")
    boxes, labels = _tensor(value["boxes"], "boxes").to(torch.float32), _integers(value["labels"], "labels")
    boxes = boxes if boxes.numel() else boxes.new_zeros(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise UserError(f"its boxes are {list(boxes.shape)}; expected [n, 4]: x1, y1, x2, y2 in pixels")
    if labels.shape != boxes.shape[:1]:
        raise UserError(f"it has {len(boxes)} boxes with labels {list(labels.shape)}; expected one a box")
    check_boxes(boxes, size)
    sample: Sample = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
        "labels": labels,
    }
    if value.get("masks") is not None:
        masks = _integers(value["masks"], "masks", or_bool=True)
        masks = masks if masks.numel() else masks.new_zeros(0, *size)
        if masks.shape != (len(boxes), *size):
            expected = f"expected {[len(boxes), *size]}: one a box, as large as the image"
            raise UserError(f"its masks are {list(masks.shape)}; {expected}")
        sample["masks"] = tv_tensors.Mask((masks != 0).to(torch.uint8))
    if value.get("keypoints") is not None:
        points = _tensor(value["keypoints"], "keypoints")
        if points.shape[:1] != boxes.shape[:1]:
            raise UserError(
                f"it has {len(boxes)} boxes and keypoints {list(points.shape)}; expected [boxes, K, 2 or 3]"
            )
        if len(boxes):
            sample.update(_points(points, "[boxes, K, 2 or 3]", 3, size))
    return sample


def check_boxes(boxes: Tensor, size: tuple[int, int]) -> None:
    """Raise ``UserError`` for boxes ``[n, 4]`` (x1, y1, x2, y2 [pixels]) that are empty, or reach out of an image of
    height and width ``size`` by more than a pixel."""
    height, width = size
    wrong = ~boxes.isfinite().all(1) | (boxes[:, 2:] <= boxes[:, :2]).any(1) | (boxes[:, :2] < -1).any(1)
    wrong |= (boxes[:, 2] > width + 1) | (boxes[:, 3] > height + 1)
    if wrong.any():
        shown = [round(number, 2) for number in boxes[wrong][0].tolist()]
        raise UserError(
            f"{int(wrong.sum())} of its {len(boxes)} boxes are empty or outside of the image of {width} x {height} "
            f"pixels, such as {shown}; expected x1, y1, x2, y2 in pixels, with x1 < x2 and y1 < y2"
        )


def _collate_objects(samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
    found = []
    for sample in samples:
        # Copies: a network may change its targets, and samples that are kept in memory must stay as they are.
        target = {"boxes": sample["boxes"].as_subclass(Tensor).clone(), "labels": sample["labels"].clone()}
        if "masks" in sample:
            target["masks"] = sample["masks"].as_subclass(Tensor).bool()
        if "keypoints" in sample:
            target["keypoints"] = _keypoints(sample)
        found.append(target)
    return found


def _collate_anything(samples: Sequence[Sample]) -> Any:
    try:
        return default_collate([sample["value"] for sample in samples])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"dataset: the targets of a batch cannot be put together: {first_line(error).rstrip('.')}. Return numbers, "
            "or tensors of one shape."
        ) from error


KINDS = {
    kind.name: kind
    for kind in (
        TargetKind("mask", "pad", "mask of classes [H, W]", _read_mask, _collate_masks, _mask_classes),
        TargetKind("image", "cut", "image", _read_picture, _collate_pictures),
        TargetKind("keypoints", "pad", "keypoints [K, 3]", _read_keypoints, _collate_keypoints),
        TargetKind(
            "objects", "pad", "dict of boxes, labels and, if there are any, masks and keypoints", _read_objects,
            _collate_objects, lambda sample: sample["labels"],
        ),
        TargetKind("any", "crop", "target", lambda value, size: {"value": value}, _collate_anything),
    )
}  # fmt: skip
CLASS = "class"  # a target that is one number: these have ways of their own, of whole batches
