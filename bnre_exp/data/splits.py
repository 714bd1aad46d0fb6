"""One split of a dataset: which of its images are used, their classes, and a digest of their contents."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset
from torchvision.datasets.folder import default_loader

from bnre_exp.data.batches import ItemView, MemoryView, PreparedImages
from bnre_exp.data.datasets import ImageTensors
from bnre_exp.data.items import file_states, own_random_state, read_item, reading_problem, refuse_files
from bnre_exp.data.listed import listed_classes, listed_files, listed_labels
from bnre_exp.data.pictures import check_header, open_picture, open_rgb
from bnre_exp.data.preprocess import Preprocessing, as_channels, resize_and_crop
from bnre_exp.data.spec import DataSpec
from bnre_exp.digests import file_sha256, stream_seed
from bnre_exp.errors import UserError
from bnre_exp.files import replacing
from bnre_exp.progress import Progress
from bnre_exp.targets import call_target, resolve_target, what_failed

logger = logging.getLogger(__name__)

# Labels that a dataset does not list are looked up for this many images, and so are contents for its digest.
_SAMPLED_ITEMS = 64

# A file that changes twice within a tick of the file system's clock (two seconds on some) has one time of change.
_CLOCK_TICK = 2 * 10**9  # [ns]

# Prepared splits of this process, by what they were made of: train and test of two datasets, so that jobs of a sweep do
# not prepare them anew.
_PREPARED: OrderedDict[str, Split] = OrderedDict()
_PREPARED_MAX = 4


@dataclass(frozen=True)
class Split:
    """One split: which images of the source are used, their classes, and a digest of their contents.

    ``indices``: ``[N]`` into the source, ascending. ``labels``: int64 ``[N]``, or fewer where the source does not
    list them and they were sampled. ``images``: if in memory, else None and ``source`` is read.
    ``notes``: what the digest does not cover.
    """

    indices: Tensor
    labels: Tensor
    digest: str
    source: Any = None
    images: PreparedImages | None = None
    notes: tuple[str, ...] = ()

    def view(
        self, positions: Tensor, preprocessing: Preprocessing, augment: bool, num_classes: int | None
    ) -> MemoryView | ItemView:
        """The images at ``positions`` (into ``indices``) as a dataset of batches."""
        if self.images is not None:
            return MemoryView(self.images, self.labels, positions, preprocessing, augment)
        return ItemView(self.source, self.indices[positions], preprocessing, augment, num_classes)


def memory_split(source: Any, indices: Tensor, preprocessing: Preprocessing, progress: Progress, name: str) -> Split:
    """Read images ``indices`` once; the digest is that of pixels, classes and how they are resized and cropped."""
    if isinstance(source, ImageTensors):
        everything = len(indices) == len(source)
        images, labels = source.images if everything else source.images[indices], source.labels[indices]
        prepared = PreparedImages(images, preprocessing)
    else:
        pixels, classes = [], []
        for index in progress(indices.tolist(), f"reading {name} images", len(indices)):
            image, label = read_item(source, index)
            pixels.append(resize_and_crop(image, preprocessing))
            classes.append(label)
        channels = max(image.shape[0] for image in pixels)
        images, labels = torch.stack([as_channels(image, channels) for image in pixels]), torch.tensor(classes)
        prepared = PreparedImages(images, preprocessing, is_done=True)
    geometry = [preprocessing.resize_size, preprocessing.image_size, preprocessing.interpolation]
    parts = [str([*images.shape, *geometry]), images.numpy(), labels.numpy()]
    return Split(indices, labels, _digest(parts), images=prepared)


def item_split(source: Any, indices: Tensor, digests_folder: Path | None, progress: Progress, name: str) -> Split:
    """Images ``indices``, read when needed; the digest is that of the files' contents, or of sampled images."""
    labels, files = listed_labels(source), listed_files(source)
    if files is not None and labels is not None:
        paths = [files[index] for index in indices.tolist()]
        has_pictures = getattr(source.dataset if isinstance(source, Subset) else source, "loader", None) in (
            open_picture,
            open_rgb,
        )
        contents = _files_digest(paths, has_pictures, digests_folder, progress, name)
        return Split(indices, labels[indices], _digest([contents, labels[indices].numpy()]), source=source)
    sampled = indices[:: max(1, len(indices) // _SAMPLED_ITEMS)].tolist()
    with own_random_state(0):
        items = [read_item(source, index) for index in sampled]
    seen = torch.tensor([label for _, label in items]) if labels is None else labels[indices]
    parts = [str(len(indices)), *(image.numpy() for image, _ in items), seen.numpy()]
    note = (
        f"the {name} images are not kept in memory and list no files: they are known by {len(sampled)} samples. After "
        "a change of the others, run with store.mode=refresh"
    )
    return Split(indices, seen, _digest(parts), source=source, notes=(note,))


def _files_digest(paths: Sequence[Path], has_pictures: bool, folder: Path | None, progress: Progress, name: str) -> str:
    """Digest of the files' names and contents; remembered in ``folder`` by their sizes and times of change.

    Raises UserError for files that cannot be read, or have no picture in them where they should.
    """
    root = os.path.commonpath([path.parent for path in paths])
    states = file_states(paths)
    seen = [f"{path} {' '.join(map(str, state))}" for path, state in zip(paths, states)]
    known = folder / _digest(seen) if folder is not None and _are_settled(states) else None
    if known is not None:
        with suppress(OSError):
            return known.read_text()
    lines, wrong = list[str](), dict[Path, str]()
    for path in progress(paths, f"reading {name} files, to know their contents", len(paths)):
        problem = reading_problem(check_header, path) if has_pictures else None
        try:
            lines.append(f"{os.path.relpath(path, root)} {file_sha256(path)}")
        except OSError as error:
            problem = str(error)
        if problem is not None:
            wrong[path] = problem
    refuse_files(wrong, len(paths))
    contents = _digest(lines)
    if known is not None:
        with suppress(OSError), replacing(known) as new:  # a folder that may only be read
            new.write_text(contents)
    return contents


def _are_settled(states: Sequence[tuple[int, ...]]) -> bool:
    """Whether another change of the files would show in their times of change."""
    return max(changed for _, _, changed, _ in states) < time.time_ns() - _CLOCK_TICK


def _digest(parts: Sequence[Any]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() + b"\n" if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
    return sha.hexdigest()


def _chosen(count: int, limit: int | None, train: bool, seed: int) -> Tensor:
    if limit is None or limit >= count:
        return torch.arange(count)
    if train:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(stream_seed(seed, "train limit")))
        return order[:limit].sort().values
    # Folders list images class by class: the first ones would be of one class.
    return torch.arange(limit) * count // limit


def load_split(
    spec: DataSpec, train: bool, *, preprocessing: Preprocessing, progress: Progress, digests_folder: Path | None
) -> Split:
    """The training or the test split that ``spec`` describes; one in memory is kept for other jobs of the process, for
    as long as its files, or else what is read from it, stay the same."""
    limit = spec.train_limit if train else spec.test_limit
    source, name = open_source(spec, train), _name(train)
    check_classes(listed_classes(source), spec.num_classes, f"the {name} images of {spec.target} have classes")
    indices = _chosen(len(source), limit, train, spec.seed)
    if not spec.in_memory:
        return item_split(source, indices, digests_folder, progress, name)
    key = _files_key(spec, source, indices, preprocessing)
    if key is None or key not in _PREPARED:
        with own_random_state(0):
            split = memory_split(source, indices, preprocessing, progress, name)
        logger.info("%d %s images in memory", len(indices), name)
        key = key or _digest([split.digest, indices.numpy()])
        _PREPARED.setdefault(key, split)
    _PREPARED.move_to_end(key)
    if len(_PREPARED) > _PREPARED_MAX:
        _PREPARED.popitem(last=False)
    return _PREPARED[key]


def _files_key(spec: DataSpec, source: Any, indices: Tensor, preprocessing: Preprocessing) -> str | None:
    """What decides a split in memory, where the dataset lists its files; None where one has to read it to know."""
    files, labels = listed_files(source), listed_labels(source)
    if files is None or labels is None:
        return None
    paths = [files[index] for index in indices.tolist()]
    states = file_states(paths)
    geometry = preprocessing.resize_size, preprocessing.image_size, preprocessing.interpolation
    made_by = json.dumps([spec.target, spec.root, dict(spec.kwargs), geometry], sort_keys=True, default=repr)
    parts = [made_by, str(list(map(str, paths))), str(states), indices.numpy(), labels[indices].numpy()]
    return _digest(parts) if _are_settled(states) else None


def open_source(spec: DataSpec, train: bool) -> Any:
    """What the dataset's callable returns: a dataset with at least one image."""
    callable_ = resolve_target(spec.target, "dataset._target_")
    with own_random_state(0):  # a random dataset gives the same whatever ran before in the process
        source = call_target(callable_, spec.target, "dataset.kwargs", spec.kwargs, train=train, root=spec.root)
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise UserError(
            f"dataset._target_={spec.target} returned a {type(source).__name__}; expected a dataset with a length and "
            "items (image, class)."
        )
    if not _length(source, spec.target):
        raise UserError(
            f"dataset._target_={spec.target} returned no {_name(train)} images; check dataset.root={spec.root}."
        )
    folder: Any = source.dataset if isinstance(source, Subset) else source
    if getattr(folder, "loader", None) is default_loader:
        folder.loader = open_rgb
    return source


def _length(source: Any, target: str) -> int:
    try:
        return len(source)
    except Exception as error:  # the user's code
        raise UserError(f"dataset._target_={target}: its length raised {what_failed(error)}") from error


def check_classes(names: Sequence[str] | None, num_classes: int | None, who: str) -> None:
    """Raise UserError where a dataset names its classes, and they are not as many as were given."""
    if names is not None and num_classes is not None and len(names) != num_classes:
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise UserError(
            f"dataset.num_classes={num_classes}, but {who} {shown}: {len(names)} of them. Leave dataset.num_classes "
            f"out, which counts them, or set dataset.num_classes={len(names)}."
        )


def _name(train: bool) -> str:
    return "training" if train else "test"
