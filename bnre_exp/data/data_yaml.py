"""The file that says where the images are that YOLO networks are trained on, and what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bnre_exp.data.pairs import PICTURES
from bnre_exp.errors import UserError, few, first_line

YOLO_LAYOUT = "Expected a file data.yaml with names, train and val, in dataset.root, or as dataset.root itself."


@dataclass(frozen=True)
class DataYaml:
    """What ``file`` says of a split. names: of classes, in order. keypoints: points an object, and numbers a point."""

    file: Path
    images: list[Path]
    names: list[str]
    keypoints: tuple[int, int] | None


def read_data_yaml(train: bool, root: str | None) -> DataYaml:
    """``root`` is the file, or a folder with a ``data.yaml``. The test split is ``val``, else ``test``. Raises
    ``UserError`` where it cannot be read, or something is missing or of another form."""
    if not root:
        raise UserError(f"dataset.root is not set. {YOLO_LAYOUT}")
    place = Path(root).expanduser()
    file = place / "data.yaml" if place.is_dir() else place
    try:
        known = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"dataset: {file} cannot be read: {first_line(error)}. {YOLO_LAYOUT}") from error
    known = known if isinstance(known, dict) else {}
    split = "train" if train else "val" if known.get("val") or not known.get("test") else "test"
    if not known.get(split) or not known.get("names"):
        raise UserError(f"dataset: {file} does not say where {split} is, or has no names. {YOLO_LAYOUT}")
    base = Path(str(known.get("path") or "")).expanduser()
    base = base if base.is_absolute() else file.parent / base
    base = base if base.is_dir() else file.parent  # a path of the machine where the file was written
    return DataYaml(
        file, _images(known[split], base, file), _names(known["names"], file), _keypoints(known.get("kpt_shape"), file)
    )


def _names(named: Any, file: Path) -> list[str]:
    """The names of classes: a list of them, or a mapping from their numbers."""
    if isinstance(named, list):
        return [str(name) for name in named]
    try:
        by_number = {int(key): str(name) for key, name in named.items()}
        return [by_number[number] for number in range(len(named))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"dataset: {file}: names={named!r}; expected a list, or names by number from 0 on.") from error


def _keypoints(shape: Any, file: Path) -> tuple[int, int] | None:
    """Points an object, and numbers a point."""
    if shape is None:
        return None
    is_pair = isinstance(shape, list) and len(shape) == 2 and all(isinstance(number, int) for number in shape)
    if not is_pair or shape[0] < 1 or shape[1] not in (2, 3):
        raise UserError(f"dataset: {file}: kpt_shape={shape}; expected [POINTS, 2] or [POINTS, 3].")
    return shape[0], shape[1]


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"dataset: {file} is no list of pictures: {first_line(error)}. {YOLO_LAYOUT}") from error


def _images(places: Any, base: Path, file: Path) -> list[Path]:
    """The pictures in folders, or that lists in text files name."""
    found, missing = list[Path](), list[str]()
    places = places if isinstance(places, list) else [places]
    if not all(isinstance(place, str) for place in places):
        raise UserError(
            f"dataset: {file}: {few(list(map(str, places)))}; expected folders of pictures, or lists of them."
        )
    for place in places:
        path = base / place
        if not path.exists() and place.startswith("../"):  # as Roboflow writes them
            path = base / place.removeprefix("../")
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
        elif path.is_file():
            found += [path.parent / line for line in _lines(path)]
        else:
            missing.append(str(path))
    if missing or not found:
        raise UserError(
            f"dataset: {file}: {few(missing) or base} {'are not there' if missing else 'holds no pictures'}."
        )
    return found
