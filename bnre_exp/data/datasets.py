"""The datasets that come with the framework: callables ``f(train, root)`` that return one split."""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import os
from collections.abc import Callable
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import find_classes

from bnre_exp.data.pictures import open_picture
from bnre_exp.errors import UserError

logger = logging.getLogger(__name__)

# Where Debian's package dataset-fashion-mnist installs its files.
DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"

# What a failed download raises: urllib and sockets (OSError), a broken answer, torchvision's own checks.
_DOWNLOAD_ERRORS = (OSError, HTTPException, RuntimeError)

_LAYOUT = "Expected ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE (or ROOT/test) with the same class folders."


class ImageTensors(Dataset[tuple[Tensor, int]]):
    """Images that are one uint8 tensor ``[N, C, H, W]`` (C = 1 or 3), with classes ``[N]`` as int64."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        is_image = images.ndim == 4 and images.dtype == torch.uint8 and images.shape[1] in (1, 3)
        if not is_image or 0 in images.shape[2:] or labels.shape != images.shape[:1]:
            raise UserError(
                f"dataset: images {images.dtype} {list(images.shape)} with labels {list(labels.shape)}; expected uint8 "
                "[N, C, H, W], C = 1 or 3, with labels [N]."
            )
        if len(labels) and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
            raise UserError(f"dataset: labels are {labels.dtype}; expected integers, such as torch.int64.")
        self.images = images
        self.labels = labels.to(torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def download_folder(root: str | None) -> str:
    """Where files are looked for, and downloaded to."""
    if root:
        return os.path.expanduser(root)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "bnre_exp", "datasets")


def download(build: Callable[[], Any], name: str, folder: str, how: str) -> Any:
    """``build()``, quietly: torchvision prints and draws bars on its own. UserError where the data cannot be had."""
    logger.info("%s: looking in %s, downloading if needed", name, folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return build()
    except _DOWNLOAD_ERRORS as error:
        raise UserError(f"dataset {name}: not found in {folder}, and the download failed ({error}). {how}") from error


def digits(train: bool, root: str | None = None) -> ImageTensors:
    """scikit-learn's handwritten digits, embedded in its wheel: grayscale 8x8, 10 classes, 1442 + 355 images.

    The split is fixed: of each class, every fifth image in the file's order is a test image. ``root`` is not used.
    """
    table = _digits_table()  # a row an image: 64 pixels of 0 to 16, and its class
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    order_in_class = torch.zeros_like(labels)
    for label in labels.unique():
        members = labels == label
        order_in_class[members] = torch.arange(int(members.sum()))
    chosen = (order_in_class % 5 == 4) != train
    pixels = torch.from_numpy(np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8))
    return ImageTensors(pixels[chosen].unsqueeze(1), labels[chosen])


def _digits_table() -> np.ndarray:
    """scikit-learn's file of digits, ``[1797, 65]``; importing scikit-learn for it takes longer than all else here."""
    found = find_spec("sklearn")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits  # a version that keeps it elsewhere

    images, labels = load_digits(return_X_y=True)
    return np.column_stack([images, labels])


def _read_idx(path: Path) -> Tensor:
    """An idx file of unsigned bytes, gzipped or not, as a uint8 tensor of the shape that its header states."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        dims = raw[3] if raw[:3] == b"\x00\x00\x08" else 0
        shape = tuple(int(size) for size in np.frombuffer(raw, dtype=">u4", count=dims, offset=4))
        if not dims or len(raw) != 4 + 4 * dims + int(np.prod(shape)):
            raise ValueError("its header does not fit its contents")
        return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape).copy())
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"dataset fashion_mnist: {path} is damaged: {error}. Expected an idx file of unsigned bytes, gzipped or "
            "not; delete it and get it again."
        ) from error


def _fashion_files(folder: Path, train: bool) -> tuple[Path, Path] | None:
    """The split's files of images and classes in ``folder``, or None."""
    stem = "train" if train else "t10k"
    for suffix in ("", ".gz"):
        pair = folder / f"{stem}-images-idx3-ubyte{suffix}", folder / f"{stem}-labels-idx1-ubyte{suffix}"
        if all(path.is_file() for path in pair):
            return pair
    return None


def fashion_mnist(train: bool, root: str | None = None) -> ImageTensors:
    """Fashion-MNIST: grayscale 28x28, 10 classes, 60000 + 10000 images.

    Looked for under ``root`` (as torchvision stores it, or the four files themselves), then where Debian's package
    installs it, then downloaded by torchvision into ``root``. The files are read in place. Raises UserError where
    none of that works.
    """
    folder = download_folder(root)
    raw = Path(folder, "FashionMNIST", "raw")
    found = [_fashion_files(place, train) for place in (Path(folder), raw, Path(DEBIAN_FASHION_MNIST))]
    files = next((pair for pair in found if pair), None)
    if files is None:
        how = (
            "Install Debian's package dataset-fashion-mnist (apt install dataset-fashion-mnist), which puts it in "
            f"{DEBIAN_FASHION_MNIST}; or run once with internet access, where torchvision downloads it into "
            "dataset.root; or copy its four idx.gz files there."
        )
        download(lambda: torchvision.datasets.FashionMNIST(folder, download=True), "fashion_mnist", folder, how)
        files = _fashion_files(raw, train)
        if files is None:
            raise UserError(f"dataset fashion_mnist: the download left no idx files in {raw}. {how}")
    logger.info("fashion_mnist: reading %s", files[0].parent)
    return ImageTensors(_read_idx(files[0]).unsqueeze(1), _read_idx(files[1]))


def _cifar(name: str, train: bool, root: str | None) -> ImageTensors:
    folder = download_folder(root)
    builder = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    split = download(
        lambda: builder(folder, train=train, download=True),
        name,
        folder,
        "Run once with internet access, or set dataset.root to a folder that holds torchvision's files "
        f"({builder.base_folder}/, or {builder.filename}).",
    )
    pixels = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
    return ImageTensors(pixels, torch.tensor(split.targets))


def cifar10(train: bool, root: str | None = None) -> ImageTensors:
    """CIFAR-10: RGB 32x32, 10 classes, 50000 + 10000 images; torchvision's files in ``root``, else downloaded."""
    return _cifar("cifar10", train, root)


def cifar100(train: bool, root: str | None = None) -> ImageTensors:
    """CIFAR-100: RGB 32x32, 100 classes, 50000 + 10000 images; torchvision's files in ``root``, else downloaded."""
    return _cifar("cifar100", train, root)


def image_folder(train: bool, root: str | None = None) -> torchvision.datasets.ImageFolder:
    """Images in one folder a class: ``root/train/CLASS/*.jpg``, and ``root/val`` or ``root/test`` alike.

    Classes are numbered in the order of their folders' names. Raises UserError where the folders are missing, a class
    is empty, or the two splits have different classes (their numbers would differ).
    """
    folder_classes(root)
    try:
        folder = split_folder(root, train)
        return torchvision.datasets.ImageFolder(str(folder), loader=open_picture)
    except OSError as error:
        raise UserError(f"dataset.root={root}: {error}. {_LAYOUT}") from error


def folder_classes(root: str | None) -> list[str]:
    """The names of an image folder's classes, in order. Raises UserError as :func:`image_folder` does."""
    try:
        train, test = (find_classes(str(split_folder(root, is_train)))[0] for is_train in (True, False))
    except OSError as error:
        raise UserError(f"dataset.root={root}: {error}. {_LAYOUT}") from error
    odd = sorted(set(train) ^ set(test))
    if odd:
        raise UserError(
            f"dataset.root={root}: {len(odd)} class folders are in one split only ({', '.join(odd[:5])}). {_LAYOUT}"
        )
    return train


def split_folder(root: str | None, train: bool, layout: str = _LAYOUT) -> Path:
    """The folder of a split, ``train``, or ``val`` or else ``test``. Raises ``UserError``, with the layout that is
    expected, where there is none."""
    if not root:
        raise UserError(f"dataset.root is not set: it is the folder of the images. {layout}")
    base = Path(os.path.expanduser(root))
    names = ("train",) if train else ("val", "test")
    found = next((base / name for name in names if (base / name).is_dir()), None)
    if found is None:
        raise UserError(f"dataset.root={root}: there is no folder {' or '.join(names)} in it. {layout}")
    return found


def imagenet(train: bool, root: str | None = None) -> torchvision.datasets.ImageFolder:
    """ImageNet-1k as :func:`image_folder`: ``root/train/n01440764/*.JPEG``, ``root/val/n01440764/*.JPEG``.

    The folders' order is that of the pretrained weights' outputs. Raises UserError where there are not 1000.
    """
    split = image_folder(train, root)
    if len(split.classes) != 1000:
        raise UserError(
            f"dataset.root={root} has {len(split.classes)} class folders; ImageNet has 1000, named by WordNet id "
            "(n01440764, ...). Sort the validation images into class folders; for other data use dataset=image_folder."
        )
    return split
