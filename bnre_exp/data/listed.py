"""What a dataset lists about its items, told without reading one: files, classes and their names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from bnre_exp.data.pictures import picture_size


def listed_files(source: Any) -> list[Path] | None:
    """The files of all items, from ``samples`` as torchvision's folders have them: (file, class), item by item."""
    if isinstance(source, Subset):
        whole = listed_files(source.dataset)
        return None if whole is None else [whole[index] for index in source.indices]
    samples = getattr(source, "samples", None)
    if not isinstance(samples, (list, tuple)) or not samples or len(samples) != len(source):
        return None
    if not all(
        isinstance(pair, (list, tuple)) and pair and isinstance(pair[0], (str, os.PathLike)) for pair in samples
    ):
        return None
    return [Path(pair[0]) for pair in samples]


def listed_labels(source: Any) -> Tensor | None:
    """The classes of all items, int64 ``[N]``, from ``labels`` or ``targets``; None unless these are integers."""
    if isinstance(source, Subset):
        every = listed_labels(source.dataset)
        return None if every is None else every[list(source.indices)]
    transform = getattr(source, "target_transform", None)
    for name in ("labels", "targets"):
        values = getattr(source, name, None)
        if not isinstance(values, (Tensor, np.ndarray, Sequence)) or len(values) != len(source):
            continue
        try:
            found = np.asarray([transform(value) for value in values] if transform is not None else values)
        except ValueError:  # of unequal lengths
            continue
        if found.ndim == 1 and found.dtype.kind in "iu":
            return torch.from_numpy(found.astype(np.int64))
    return None


def listed_classes(source: Any) -> list[str] | None:
    """The names of the classes, from ``classes``; None where a ``target_transform`` numbers them anew."""
    if isinstance(source, Subset):
        return listed_classes(source.dataset)
    classes = getattr(source, "classes", None)
    if not isinstance(classes, (list, tuple)) or not classes or getattr(source, "target_transform", None) is not None:
        return None
    return [str(name) for name in classes]


class InFiles(Dataset[Any]):
    """Images by file whose targets come from files, too. ``classes``: names, in order."""

    def __init__(self, images: Sequence[Path], classes: Sequence[str]) -> None:
        self.images, self.classes = list(images), list(classes)
        self.samples = [(path, None) for path in self.images]  # names an item where it cannot be read

    def __len__(self) -> int:
        return len(self.images)

    def files_of(self, indices: Sequence[int]) -> list[Path]:
        """All files that decide what these items are."""
        raise NotImplementedError

    def target(self, index: int, size: tuple[int, int]) -> Any:
        """The target of an image of width and height ``size``."""
        raise NotImplementedError


def files_of(source: Any, indices: Sequence[int]) -> list[Path] | None:
    """All files that decide what the items are of a dataset that is :class:`InFiles`."""
    if isinstance(source, Subset):
        return files_of(source.dataset, [source.indices[index] for index in indices])
    return source.files_of(indices) if isinstance(source, InFiles) else None


def target_reader(source: Any) -> Callable[[int], tuple[Any, tuple[int, int]]] | None:
    """How an item's target and its image's height and width are read of :class:`InFiles`, without its pixels."""
    if isinstance(source, Subset):
        read = target_reader(source.dataset)
        return None if read is None else lambda index: read(source.indices[index])
    if not isinstance(source, InFiles):
        return None

    def read_one(index: int) -> tuple[Any, tuple[int, int]]:
        width, height = picture_size(source.images[index])
        return source.target(index, (width, height)), (height, width)

    return read_one
