"""Items of a dataset, read and checked one by one; what cannot be used is named."""

from __future__ import annotations

import contextlib
import random
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from bnre_exp.data.geometry import fitted
from bnre_exp.data.preprocess import Preprocessing, to_uint8
from bnre_exp.data.samples import Sample, TargetKind, read_sample
from bnre_exp.errors import UserError
from bnre_exp.targets import what_failed

REPAIR = "Repair or remove the file."


@contextlib.contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Seed the CPU generators of torch, numpy and Python, and put back what they held before."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def read_item(source: Any, index: int, num_classes: int | None = None) -> tuple[Tensor, int]:
    """Item ``index`` as (uint8 ``[C, H, W]``, class); UserError where it cannot be read or is something else.

    num_classes: classes must lie below it; None: any integer.
    """
    name, item = item_name(source, index), _fetch(source, index)
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise UserError(f"dataset: item {name} is a {type(item).__name__}; expected a pair (image, class number).")
    try:
        pixels = to_uint8(item[0])
    except UserError as error:
        raise UserError(f"dataset: item {name}: {str(error).removeprefix('dataset: ')}") from error
    except OSError as error:  # a picture that was opened, and is decoded here
        raise UserError(f"dataset: image {name} cannot be read: {error}. {REPAIR}") from error
    label = _integer(item[1])
    if label is None:
        shown = repr(item[1])
        shown = shown if len(shown) <= 60 else f"a {type(item[1]).__name__}"
        raise UserError(
            f"dataset: the class of item {name} is {shown}; expected an integer. For masks, boxes and other targets "
            "set task, as in task=segmentation or task=detection (docs/tasks.md)."
        )
    if num_classes is not None and not 0 <= label < num_classes:
        raise UserError(
            f"dataset: the class of item {name} is {label}; expected 0 to {num_classes - 1} "
            f"(dataset.num_classes={num_classes})."
        )
    return pixels, label


def _fetch(source: Any, index: int) -> Any:
    """What the dataset gives. Raises ``UserError`` naming the item where it raises anything."""
    name = item_name(source, index)
    try:
        return source[index]
    except UserError as error:
        raise UserError(f"dataset: item {name}: {str(error).removeprefix('dataset: ')}") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"dataset: image {name} cannot be read: {error}. {REPAIR}") from error
    except Exception as error:  # the user's code, or PIL, which has many ways to refuse a damaged file
        raise UserError(
            f"dataset: reading item {name} of {type(source).__name__} raised {what_failed(error)}"
        ) from error


def read_fitted(source: Any, index: int, kind: TargetKind, num_classes: int | None, how: Preprocessing) -> Sample:
    """Item ``index`` as a sample of ``kind`` in the size of ``how``; ``UserError`` where it cannot be read or is
    something else."""
    name, item = item_name(source, index), _fetch(source, index)
    try:
        return fitted(read_sample(item, kind, num_classes), how)
    except UserError as error:
        said = str(error).removeprefix("dataset: ").rstrip(".")
        raise UserError(f"dataset: item {name}: {said}.") from error
    except OSError as error:  # a picture that was opened, and is decoded here
        raise UserError(f"dataset: image {name} cannot be read: {error}. {REPAIR}") from error


def _integer(value: Any) -> int | None:
    """``value`` as an int, if it is one (or a tensor or array that holds one); True and 1.0 are none."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and np.prod(value.shape) == 1:
        value = value.item()
    return int(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def item_name(source: Any, index: int) -> str:
    """The item's number, and its file where the dataset names it."""
    inner, where = (source.dataset, source.indices[index]) if isinstance(source, Subset) else (source, index)
    for name in ("samples", "imgs"):
        listed = getattr(inner, name, None)
        if isinstance(listed, (list, tuple)) and where < len(listed) and isinstance(listed[where], (list, tuple)):
            return f"{index} ({listed[where][0]})"
    return str(index)


def file_states(paths: Sequence[Path]) -> list[tuple[int, ...]]:
    """Size, times of change and inode of every file. Raises UserError naming those that hold nothing to read."""
    states, wrong = list[tuple[int, ...]](), dict[Path, str]()
    for path in paths:
        try:
            found = path.stat()
        except OSError as error:
            is_broken = path.is_symlink() and isinstance(error, FileNotFoundError)
            wrong[path] = "a symbolic link to nothing" if is_broken else str(error.strerror or error)
            continue
        if not stat.S_ISREG(found.st_mode):
            wrong[path] = "no regular file"
        elif not found.st_size:
            wrong[path] = "empty"
        states.append((found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino))
    refuse_files(wrong, len(paths))
    return states


def refuse_files(wrong: dict[Path, str], count: int) -> None:
    """Raise UserError naming the first of ``wrong``, each with its reason, if there are any among ``count`` files."""
    if wrong:
        first = "; ".join(f"{path}: {reason}" for path, reason in list(wrong.items())[:3])
        raise UserError(f"dataset: {len(wrong)} of {count} image files cannot be read: {first}. Repair or remove them.")


def reading_problem(read: Callable[[Any], Any], what: Any) -> str | None:
    """What is wrong with a file or an item, as ``read`` says; None if it can be read."""
    try:
        read(what)
    except Exception as error:  # PIL has many ways to refuse a damaged file
        return str(error) or type(error).__name__
    return None
