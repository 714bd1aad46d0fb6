"""Datasets of images with objects: COCO's annotations, and the folders that YOLO is trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bnre_exp.data.pairs import PICTURES
from bnre_exp.data.pictures import open_picture
from bnre_exp.errors import UserError, few, first_line

COCO_LAYOUT = (
    "Expected ROOT/annotations/instances_train2017.json with ROOT/train2017/, and instances_val2017.json with "
    "ROOT/val2017/; others by dataset.kwargs: train_annotations, train_images, val_annotations, val_images."
)
YOLO_LAYOUT = "Expected a file data.yaml with names, train and val, in dataset.root, or as dataset.root itself."


class Objects(Dataset[Any]):
    """Images by file, with boxes, labels and, where they have them, masks and keypoints, made when they are asked for.

    classes: names, in order. files: all that decide what is in it.
    """

    def __init__(self, images: Sequence[Path], classes: Sequence[str], files: Sequence[Path]) -> None:
        self.images, self.classes, self.files = list(images), list(classes), [*images, *files]
        self.samples = [(path, None) for path in self.images]  # names an item where it cannot be read

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        image = open_picture(self.images[index])
        return image, self.target(index, image.size)

    def target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """Boxes ``[n, 4]`` (x1, y1, x2, y2 [pixels]), labels ``[n]``, and what else there is. size: width, height."""
        raise NotImplementedError


class _Coco(Objects):
    def __init__(self, file: Path, folder: Path) -> None:
        self.file, known = file, _json_of(file)
        names = {int(entry["id"]): str(entry["name"]) for entry in known["categories"]}
        self.numbers = {category: number for number, category in enumerate(sorted(names))}
        self.annotations: dict[int, list[Mapping[str, Any]]] = {int(entry["id"]): [] for entry in known["images"]}
        for annotation in known["annotations"]:
            self._take(annotation)
        self.ids = sorted(self.annotations)
        paths = {int(entry["id"]): folder / str(entry["file_name"]) for entry in known["images"]}
        super().__init__(
            [paths[number] for number in self.ids], [names[category] for category in sorted(names)], [file]
        )

    def _take(self, annotation: Mapping[str, Any]) -> None:
        image, category = int(annotation["image_id"]), int(annotation["category_id"])
        if image not in self.annotations or category not in self.numbers:
            what = f"image_id {image}" if image not in self.annotations else f"category_id {category}"
            raise UserError(
                f"dataset: {self.file}: annotation {annotation.get('id')} has the {what}, which is in no list."
            )
        if not annotation.get("iscrowd"):
            self.annotations[image].append(annotation)

    def target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        found = self.annotations[self.ids[index]]
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
        known: Mapping[str, Any] = json.loads(file.read_text())
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


def coco(
    train: bool, root: str | None = None, train_annotations: str = "annotations/instances_train2017.json",
    train_images: str = "train2017", val_annotations: str = "annotations/instances_val2017.json",
    val_images: str = "val2017",
) -> Objects:  # fmt: skip
    """Images with COCO's annotations: boxes, masks (polygons or run lengths), keypoints; crowds are left out.

    Paths are below ``root``. Classes are numbered by the order of their category ids. Raises ``UserError`` for files
    that are not there, and annotations of unknown images or categories.
    """
    if not root:
        raise UserError(f"dataset.root is not set: it is the folder of annotations and images. {COCO_LAYOUT}")
    base = Path(root).expanduser()
    return _Coco(
        base / (train_annotations if train else val_annotations), base / (train_images if train else val_images)
    )


class _Yolo(Objects):
    def __init__(self, images: Sequence[Path], names: Sequence[str], keypoints: tuple[int, int] | None) -> None:
        self.labels, self.keypoints = [_labels_file(path) for path in images], keypoints
        super().__init__(images, names, [path for path in self.labels if path.is_file()])

    def target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        file, rows = self.labels[index], list[list[float]]()
        for number, line in enumerate(file.read_text().splitlines() if file.is_file() else (), start=1):
            if line.strip():
                rows.append(_numbers(line, file, number))
        labels = torch.tensor([int(row[0]) for row in rows], dtype=torch.int64)
        scale = torch.tensor([*size, *size], dtype=torch.float32)
        if self.keypoints is None and any(len(row) > 5 for row in rows):
            return {"labels": labels, **_polygons(rows, size)}
        boxes = torch.tensor([row[1:5] for row in rows]).reshape(-1, 4)
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1) * scale
        target: dict[str, Any] = {"boxes": corners, "labels": labels}
        if self.keypoints is not None:
            count, dims = self.keypoints
            wrong = next((row for row in rows if len(row) != 5 + count * dims), None)
            if wrong is not None:
                raise UserError(f"{file} has a row of {len(wrong)} numbers; kpt_shape says {5 + count * dims}")
            points = torch.tensor([row[5:] for row in rows]).reshape(-1, count, dims)
            target["keypoints"] = torch.cat([points[..., :2] * scale[:2], points[..., 2:]], dim=-1)
        return target


def _numbers(line: str, file: Path, number: int) -> list[float]:
    try:
        row = [float(part) for part in line.split()]
    except ValueError as error:
        raise UserError(f"{file}, line {number}: {first_line(error)}") from error
    if len(row) < 5 or row[0] != int(row[0]):
        raise UserError(
            f"{file}, line {number}: {line!r}; expected CLASS X Y WIDTH HEIGHT, as parts of the image's sides"
        )
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
    outline. An image without a file of labels has no objects. Raises ``UserError`` where something is missing.
    """
    if not root:
        raise UserError(f"dataset.root is not set. {YOLO_LAYOUT}")
    place = Path(root).expanduser()
    file = place / "data.yaml" if place.is_dir() else place
    try:
        known = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"dataset: {file} cannot be read: {first_line(error)}. {YOLO_LAYOUT}") from error
    split = (
        "train"
        if train
        else next((name for name in ("val", "test") if isinstance(known, dict) and known.get(name)), "val")
    )
    if not isinstance(known, dict) or not known.get(split) or not known.get("names"):
        raise UserError(f"dataset: {file} does not say where {split} is, or has no names. {YOLO_LAYOUT}")
    named = known["names"]
    names = [str(named[key]) for key in sorted(named)] if isinstance(named, dict) else [str(name) for name in named]
    base = Path(known.get("path") or "")
    base = base if base.is_absolute() else file.parent / base
    base = base if base.is_dir() else file.parent  # a path of the machine where the file was written
    images = _images(known[split], base, file)
    shape = known.get("kpt_shape")
    dataset = _Yolo(images, names, (int(shape[0]), int(shape[1])) if shape else None)
    if not any(path.is_file() for path in dataset.labels):
        raise UserError(
            f"dataset: none of the {len(images)} images of {split} has a file of labels, such as {dataset.labels[0]}. "
            f"{YOLO_LAYOUT}"
        )
    return dataset


def _images(places: Any, base: Path, file: Path) -> list[Path]:
    """The pictures in folders, or that lists in text files name."""
    found, missing = list[Path](), list[str]()
    for place in [places] if isinstance(places, str) else list(places):
        path = base / place
        if not path.exists() and place.startswith("../"):  # as Roboflow writes them
            path = base / place.removeprefix("../")
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
        elif path.is_file():
            found += [path.parent / line.strip() for line in path.read_text().splitlines() if line.strip()]
        else:
            missing.append(str(path))
    if missing or not found:
        raise UserError(
            f"dataset: {file}: {few(missing) or base} {'are not there' if missing else 'holds no pictures'}."
        )
    return found
