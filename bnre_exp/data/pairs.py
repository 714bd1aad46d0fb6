"""Datasets of images that come with another image: masks of classes, or what a network should make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from bnre_exp.data.datasets import download, download_folder, split_folder
from bnre_exp.data.listed import InFiles
from bnre_exp.data.pictures import open_picture
from bnre_exp.errors import UserError, few

PICTURES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class FilePairs(InFiles):
    """Pairs of files: the image, and its target as ``open_target`` gives it. ``classes``: their names."""

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], open_target: Callable[[Path], Any], classes: Sequence[str] = ()
    ) -> None:
        super().__init__([image for image, _ in pairs], classes)
        self.target_files, self.open_target = [target for _, target in pairs], open_target

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        image = open_picture(self.images[index])
        return image, self.target(index, image.size)

    def files_of(self, indices: Sequence[int]) -> list[Path]:
        return [file for index in indices for file in (self.images[index], self.target_files[index])]

    def target(self, index: int, size: tuple[int, int]) -> Any:
        try:
            return self.open_target(self.target_files[index])
        except OSError as error:
            said = f"dataset: {self.target_files[index]} cannot be read: {error}. Repair or remove the file."
            raise UserError(said) from error


def _pairs(root: str | None, train: bool, first: str, second: str) -> list[tuple[Path, Path]]:
    """Files of one name, but for its ending, in two folders of a split. Raises ``UserError`` where one is alone."""
    layout = (
        f"Expected ROOT/train/{first}/NAME.png with ROOT/train/{second}/NAME.png, and ROOT/val (or ROOT/test) alike; "
        "the two may have different endings."
    )
    folder = split_folder(root, train, layout)
    found = [_by_name(folder / name, layout) for name in (first, second)]
    alone = sorted(set(found[0]) ^ set(found[1]))
    if alone:
        raise UserError(
            f"dataset.root={root}: in {folder.name}, {len(alone)} pictures are in one of {first} and {second} only: "
            f"{few(alone)}. {layout}"
        )
    return [(found[0][name], found[1][name]) for name in sorted(found[0])]


def _by_name(folder: Path, layout: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"dataset: there is no folder {folder}. {layout}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    found = {path.stem: path for path in files}
    if not files or len(found) < len(files):
        what = "two pictures of one name" if files else "no pictures"
        raise UserError(f"dataset: {folder} has {what}. {layout}")
    return found


def open_mask(path: Path) -> Tensor:
    """The class of each pixel ``[H, W]``, uint8: the file's own numbers, into its palette, or as gray levels."""
    image = open_picture(path)
    if image.mode not in ("1", "L", "P"):
        raise UserError(
            f"dataset: the mask {path} is a picture of mode {image.mode}; expected one class a pixel, as 8-bit gray "
            "levels (L) or a palette (P)."
        )
    return torch.from_numpy(np.array(ImageOps.exif_transpose(image)).astype(np.uint8))


def image_masks(train: bool, root: str | None = None, classes: Sequence[str] = ()) -> FilePairs:
    """Images with masks: ``root/train/images/NAME.jpg`` and ``root/train/masks/NAME.png``, and ``root/val`` (or
    ``root/test``) alike. A mask's pixels are classes from 0; 255 does not count. classes: their names, in order."""
    return FilePairs(_pairs(root, train, "images", "masks"), open_mask, classes)


def image_pairs(train: bool, root: str | None = None) -> FilePairs:
    """Images with what a network should make of them: ``root/train/input/NAME.png`` and ``root/train/target/NAME.png``,
    and ``root/val`` (or ``root/test``) alike. Targets have the size of the images, or a whole number of times it."""
    return FilePairs(_pairs(root, train, "input", "target"), open_picture)


VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_YEARS = ("2007", "2008", "2009", "2010", "2011", "2012")


class _Voc(InFiles):
    """torchvision's Pascal VOC, as boxes: class numbers are places in ``classes``."""

    def __init__(self, source: Any, with_difficult: bool) -> None:
        super().__init__([Path(file) for file in source.images], VOC_CLASSES)
        self.source, self.with_difficult = source, with_difficult

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Tensor]]:
        image = open_picture(self.images[index])
        return image, self.target(index, image.size)

    def files_of(self, indices: Sequence[int]) -> list[Path]:
        return [Path(files[index]) for index in indices for files in (self.images, self.source.annotations)]

    def target(self, index: int, size: tuple[int, int]) -> dict[str, Tensor]:
        from torchvision.datasets.voc import ET_parse

        found = self.source.parse_voc_xml(ET_parse(self.source.annotations[index]).getroot())["annotation"]
        objects = [o for o in found.get("object", []) if self.with_difficult or o.get("difficult", "0") != "1"]
        sides = [[float(o["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
        boxes = torch.tensor(sides).reshape(-1, 4) - torch.tensor([1.0, 1.0, 0.0, 0.0])  # VOC counts pixels from 1
        labels = torch.tensor([self.classes.index(o["name"]) for o in objects], dtype=torch.int64)
        return {"boxes": boxes, "labels": labels}


def voc(
    train: bool, root: str | None = None, targets: str = "objects", year: str | int = "2012", difficult: bool = False
) -> Dataset[Any]:
    """Pascal VOC, as torchvision's files in ``root``, else downloaded: boxes of 20 classes, or masks (0: background;
    255 does not count). The test split is VOC's ``val``. difficult: take objects that are marked as difficult, too."""
    folder, split = download_folder(root), "train" if train else "val"
    how = f"Run once with internet access, or set dataset.root to a folder with VOCdevkit/VOC{year}."
    kind = {"objects": torchvision.datasets.VOCDetection, "mask": torchvision.datasets.VOCSegmentation}.get(targets)
    if kind is None:
        raise UserError(f"dataset voc has boxes and masks, for detection and segmentation; the task takes {targets!r}.")
    if str(year) not in VOC_YEARS:
        raise UserError(f"dataset voc: year={year}; expected one of {', '.join(VOC_YEARS)}.")

    def build() -> Any:
        try:
            return kind(folder, year=str(year), image_set=split)
        except RuntimeError:  # it is not there
            return kind(folder, year=str(year), image_set=split, download=True)

    source = download(build, "voc", folder, how)
    if targets == "objects":
        return _Voc(source, difficult)
    pairs = [(Path(image), Path(mask)) for image, mask in zip(source.images, source.masks)]
    return FilePairs(pairs, open_mask, ("background", *VOC_CLASSES))


def _open_trimap(path: Path) -> Tensor:
    return open_mask(path) - 1  # 1: pet, 2: background, 3: not classified


def oxford_pet(train: bool, root: str | None = None, targets: str = "mask") -> Any:
    """Oxford-IIIT Pet, as torchvision's files in ``root``, else downloaded: masks of pet, background and border, or
    (for classification) 37 breeds. The test split is the data's ``test``."""
    folder, split = download_folder(root), "trainval" if train else "test"
    how = "Run once with internet access, or set dataset.root to a folder with oxford-iiit-pet/."
    if targets not in ("mask", "class"):
        raise UserError(f"dataset oxford_pet has masks and classes; the task takes {targets!r}.")
    kind = "segmentation" if targets == "mask" else "category"
    build: Callable[[], Any] = lambda: torchvision.datasets.OxfordIIITPet(  # noqa: E731
        folder, split=split, target_types=kind, download=True
    )
    source = download(build, "oxford_pet", folder, how)
    if targets == "class":
        source.samples = [(path, label) for path, label in zip(source._images, source._labels)]
        source.targets = list(source._labels)
        return source
    return FilePairs(list(zip(source._images, source._segs)), _open_trimap, ("pet", "background", "border"))
