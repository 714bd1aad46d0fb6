"""What a dataset lists about its items, told without reading one: files, classes and their names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset


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


def all_files(source: Any) -> list[Path] | None:
    """All files that decide what a dataset gives, from ``files``, which datasets of this package have whose targets are
    files."""
    if isinstance(source, Subset):
        return all_files(source.dataset)
    files = getattr(source, "files", None)
    is_list = isinstance(files, (list, tuple)) and files and all(isinstance(f, (str, os.PathLike)) for f in files)
    return [Path(file) for file in files] if is_list and files is not None else None
