"""Datasets of images with objects: COCO's annotations, and the folders that YOLO is trained on."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnre_exp.data.data_yaml import YOLO_LAYOUT, DataYaml, read_data_yaml
from bnre_exp.data.listed import InFiles
from bnre_exp.data.pictures import open_picture, picture_pixels
from bnre_exp.data.reading import are_settled
from bnre_exp.errors import UserError, first_line

COCO_LAYOUT = (
    "Expected ROOT/annotations/instances_train2017.json with ROOT/train2017/, and instances_val2017.json with "
    "ROOT/val2017/; others by dataset.kwargs: train_annotations, train_images, val_annotations, val_images."
)
COCO_ENTRIES = (
    "expected images with id and file_name, categories with id and name, and annotations with image_id, category_id "
    "and bbox: x, y, width, height"
)
YOLO_ROWS = "expected CLASS X Y WIDTH HEIGHT, as parts of the image's sides, then keypoints; or CLASS and an outline"

# Files of annotations as they were parsed, with their states: two splits of two datasets. A job asks some three times.
_PARSED: OrderedDict[Path, tuple[tuple[int, ...], Any]] = OrderedDict()
_PARSED_MAX = 4


class Objects(InFiles):
    """Images with boxes, labels and, where they have them, masks and keypoints, made when they are asked for."""

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image = picture_pixels(open_picture(self.images[index]))  # upright, as what is annotated was shown
        return image, self.target(index, (image.shape[-1], image.shape[-2]))

    def target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """Boxes ``[n, 4]`` (x1, y1, x2, y2 [pixels]), labels ``[n]``, and what else there is. size: width, height."""
        raise NotImplementedError


class _Coco(Objects):
    def __init__(self, file: Path, folder: Path) -> None:
        self.file, known = file, _json_of(file)
        names = {int(entry["id"]): str(entry["name"]) for entry in known["categories"]}
        self.numbers = {category: number for number, category in enumerate(sorted(names))}
        self.annotations: dict[int, list[Mapping[str, Any]]] = {int(entry["id"]): [] for entry in known["images"]}
        self.sizes = {int(entry["id"]): (entry.get("width"), entry.get("height")) for entry in known["images"]}
        for annotation in known["annotations"]:
            self._take(annotation)
        self.ids = sorted(self.annotations)
        paths = {int(entry["id"]): folder / str(entry["file_name"]) for entry in known["images"]}
        super().__init__([paths[number] for number in self.ids], [names[category] for category in sorted(names)])

    def files_of(self, indices: Sequence[int]) -> list[Path]:
        return [*(self.images[index] for index in indices), self.file]

    def _take(self, annotation: Mapping[str, Any]) -> None:
        image, category = int(annotation["image_id"]), int(annotation["category_id"])
        if image not in self.annotations or category not in self.numbers:
            what = f"image_id {image}" if image not in self.annotations else f"category_id {category}"
            raise UserError(
                f"dataset: {self.file}: annotation {annotation.get('id')} has the {what}, which is in no list."
            )
        left, top, width, height = map(float, annotation["bbox"])
        is_empty = width == 0 or height == 0  # COCO's own training images have one
        wide, high = self.sizes[image]
        if wide and high and not is_empty:
            right, bottom = left + width, top + height
            if not (-1 <= left < right <= wide + 1 and -1 <= top < bottom <= high + 1):
                raise UserError(
                    f"dataset: {self.file}: the box {annotation['bbox']} of annotation {annotation.get('id')} is empty "
                    f"or outside of its image {image}, which has {wide} x {high} pixels; expected x, y, width, height "
                    "in pixels."
                )
        if not annotation.get("iscrowd") and not is_empty:
            self.annotations[image].append(annotation)

    def target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        found, told = self.annotations[self.ids[index]], self.sizes[self.ids[index]]
        if all(told) and told != size:
            raise UserError(f"it has {size[0]} x {size[1]} pixels; {self.file} says {told[0]} x {told[1]}")
        boxes = torch.tensor([list(map(float, one["bbox"])) for one in found]).reshape(-1, 4)
        target: dict[str, Any] = {
            "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
            "labels": torch.tensor([self.numbers[int(one["category_id"])] for one in found], dtype=torch.int64),
        }
        if found and all(one.get("segmentation") for one in found):
            masks = [_mask_of(one["segmentation"], size) for one in found]
            target["masks"] = torch.stack(masks)
        if found and all(one.get("keypoints") for one in found):
            target["keypoints"] = torch.tensor([one["keypoints"] for one in found]).float().reshape(len(found), -1, 3)
        return target


def _mask_of(segmentation: Any, size: tuple[int, int]) -> Tensor:
    """A mask ``[H, W]`` from COCO's polygons or run lengths."""
    from pycocotools import mask

    width, height = size
    if isinstance(segmentation, list):
        lengths = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        lengths = mask.frPyObjects(segmentation, height, width)
    else:
        lengths = segmentation
    return torch.from_numpy(np.ascontiguousarray(mask.decode(lengths))).bool()


def _json_of(file: Path) -> Mapping[str, Any]:
    try:
        known = _parsed(file)
    except (OSError, ValueError) as error:
        raise UserError(f"dataset: {file} cannot be read: {first_line(error)}. {COCO_LAYOUT}") from error
    missing = [
        name for name in ("images", "annotations", "categories") if not isinstance(known, dict) or not known.get(name)
    ]
    if missing:
        raise UserError(
            f"dataset: {file} lists no {' and no '.join(missing)}; expected COCO's instances. {COCO_LAYOUT}"
        )
    return known


def _parsed(file: Path) -> Any:
    """What a file of JSON holds; kept for the next ones who ask, for as long as its size and times of change stay."""
    place, found = file.resolve(), file.stat()
    state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    before, known = _PARSED.pop(place, ((), None))
    if before != state:
        known = json.loads(file.read_text(encoding="utf-8"))
    if are_settled([state]):
        _PARSED[place] = state, known
    while len(_PARSED) > _PARSED_MAX:
        _PARSED.popitem(last=False)
    return known


def coco(
    train: bool, root: str | None = None, train_annotations: str = "annotations/instances_train2017.json",
    train_images: str = "train2017", val_annotations: str = "annotations/instances_val2017.json",
    val_images: str = "val2017",
) -> Objects:  # fmt: skip
    """Images with COCO's annotations: boxes, masks (polygons or run lengths), keypoints; crowds and boxes without width
    or height are left out.

    Paths are below ``root``. Classes are numbered by the order of their category ids. Raises ``UserError`` for files
    that are not there or of another form, and annotations of unknown images or categories.
    """
    if not root:
        raise UserError(f"dataset.root is not set: it is the folder of annotations and images. {COCO_LAYOUT}")
    base = Path(root).expanduser()
    file, folder = base / (train_annotations if train else val_annotations), train_images if train else val_images
    try:
        return _Coco(file, base / folder)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"dataset: {file} has an entry of another form ({type(error).__name__}: {error}); {COCO_ENTRIES}."
        ) from error


class _Yolo(Objects):
    def __init__(self, known: DataYaml) -> None:
        super().__init__(known.images, known.names)
        self.labels, self.keypoints, self.file = list(map(_labels_file, known.images)), known.keypoints, known.file

    def files_of(self, indices: Sequence[int]) -> list[Path]:
        """A file of labels that is empty says the same as none."""
        labels = [self.labels[index] for index in indices]
        labels = [path for path in labels if path.is_file() and path.stat().st_size]
        return [*(self.images[index] for index in indices), *labels, self.file]

    def target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        rows = _rows(self.labels[index], self.keypoints)
        labels = torch.tensor([int(row[0]) for row in rows], dtype=torch.int64)
        scale = torch.tensor([*size, *size], dtype=torch.float32)
        if self.keypoints is None and any(len(row) > 5 for row in rows):
            return {"labels": labels, **_polygons(rows, size)}
        boxes = torch.tensor([row[1:5] for row in rows]).reshape(-1, 4)
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1) * scale
        target: dict[str, Any] = {"boxes": corners, "labels": labels}
        if self.keypoints is not None:
            points = torch.tensor([row[5:] for row in rows]).reshape(-1, *self.keypoints)
            target["keypoints"] = torch.cat([points[..., :2] * scale[:2], points[..., 2:]], dim=-1)
        return target


def _rows(file: Path, keypoints: tuple[int, int] | None) -> list[tuple[float, ...]]:
    """The rows of a file of labels, each once; none where there is no file."""
    lines = file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else []
    rows = {number: _numbers(line, file, number) for number, line in enumerate(lines, start=1) if line.strip()}
    has_outlines = keypoints is None and any(len(row) > 5 for row in rows.values())
    for number, row in rows.items():
        if keypoints is not None and len(row) != 5 + keypoints[0] * keypoints[1]:
            expected = f"kpt_shape={list(keypoints)} says {5 + keypoints[0] * keypoints[1]}"
            raise UserError(f"{file}, line {number}: a row of {len(row)} numbers; {expected}")
        if has_outlines and (len(row) < 7 or len(row) % 2 == 0):
            expected = "expected an outline of three points or more, as other rows of the file have one"
            raise UserError(f"{file}, line {number}: a row of {len(row)} numbers; {expected}")
    return list(dict.fromkeys(rows.values()))


def _numbers(line: str, file: Path, number: int) -> tuple[float, ...]:
    try:
        row = tuple(float(part) for part in line.split())
    except ValueError as error:
        raise UserError(f"{file}, line {number}: {first_line(error)}; {YOLO_ROWS}") from error
    if len(row) < 5 or not row[0].is_integer():
        raise UserError(f"{file}, line {number}: {line!r}; {YOLO_ROWS}")
    return row


def _polygons(rows: Sequence[Sequence[float]], size: tuple[int, int]) -> dict[str, Tensor]:
    """Masks of outlines (class, x1, y1, x2, y2, ...; parts of the image's sides), and the boxes around these."""
    scale = torch.tensor(size, dtype=torch.float32)
    outlines = [torch.tensor(row[1:]).reshape(-1, 2) * scale for row in rows]
    boxes = torch.stack([torch.cat([outline.amin(0), outline.amax(0)]) for outline in outlines])
    masks = [_mask_of([outline.flatten().tolist()], size) for outline in outlines]
    return {"boxes": boxes, "masks": torch.stack(masks)}


def _labels_file(image: Path) -> Path:
    """Where the labels of an image are: in the folder ``labels`` in place of the last ``images`` of its path."""
    parts = list(image.parts)
    places = [place for place, part in enumerate(parts) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def yolo_folder(train: bool, root: str | None = None) -> Objects:
    """What YOLO networks are trained on: ``root`` is a ``data.yaml``, or a folder with one, that names ``train``,
    ``val``, ``names`` and, for poses, ``kpt_shape``; labels are in ``labels/*.txt`` beside ``images/*``.

    A row of labels is CLASS X Y WIDTH HEIGHT (centre; as parts of the image's sides), then keypoints; or CLASS and an
    outline. A row that is there twice counts once. An image without a file of labels, or with an empty one, has no
    objects. Raises ``UserError`` where something is missing or of another form.
    """
    known = read_data_yaml(train, root)
    dataset = _Yolo(known)
    kind = "training" if train else "test"
    if not any(path.is_file() for path in dataset.labels):
        raise UserError(
            f"dataset: {known.file}: none of the {len(known.images)} {kind} images has a file of labels, such as "
            f"{dataset.labels[0]}. {YOLO_LAYOUT}"
        )
    return dataset
