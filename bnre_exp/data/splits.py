"""One split of a dataset: which of its images are used, their classes, and a digest of their contents."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnre_exp.data.batches import ItemView, MemoryView, PreparedImages, own_random_state, read_item
from bnre_exp.data.datasets import ImageTensors
from bnre_exp.data.preprocess import Preprocessing, as_channels, resize_and_crop
from bnre_exp.data.spec import DataSpec
from bnre_exp.digests import file_sha256, stream_seed
from bnre_exp.errors import UserError
from bnre_exp.files import replacing
from bnre_exp.progress import Progress
from bnre_exp.targets import call_target, resolve_target

logger = logging.getLogger(__name__)

# Labels that a dataset does not list are looked up for this many images, and so are contents for its digest.
_SAMPLED_ITEMS = 64

# Prepared splits of this process: train and test of two datasets, so that jobs of a sweep do not prepare them anew.
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

    def view(self, positions: Tensor, preprocessing: Preprocessing, augment: bool) -> MemoryView | ItemView:
        """The images at ``positions`` (into ``indices``) as a dataset of batches."""
        if self.images is not None:
            return MemoryView(self.images, self.labels, positions, preprocessing, augment)
        return ItemView(self.source, self.indices[positions], preprocessing, augment)


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
    labels = _listed_labels(source)
    samples = getattr(source, "samples", None)
    if samples and labels is not None:
        paths = [Path(samples[index][0]) for index in indices.tolist()]
        contents = _files_digest(paths, digests_folder, progress, name)
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


def _files_digest(paths: Sequence[Path], folder: Path | None, progress: Progress, name: str) -> str:
    """Digest of the files' names and contents; remembered in ``folder`` by their sizes and times of change."""
    root = os.path.commonpath([path.parent for path in paths])
    stats = [path.stat() for path in paths]
    seen = [f"{p} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}" for p, s in zip(paths, stats)]
    known = folder / _digest(seen) if folder is not None else None
    if known is not None:
        with suppress(OSError):
            return known.read_text()
    files = progress(paths, f"reading {name} files, to know their contents", len(paths))
    contents = _digest([f"{os.path.relpath(path, root)} {file_sha256(path)}" for path in files])
    if known is not None:
        with suppress(OSError), replacing(known) as new:  # a folder that may only be read
            new.write_text(contents)
    return contents


def _listed_labels(source: Any) -> Tensor | None:
    """The classes of all images, where the dataset lists them without reading an image."""
    for name in ("labels", "targets"):
        values = getattr(source, name, None)
        if isinstance(values, (Tensor, np.ndarray, Sequence)) and len(values) == len(source):
            return torch.as_tensor(np.asarray(values), dtype=torch.int64)
    return None


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
    """The training or the test split that ``spec`` describes; one in memory is kept for other jobs of the process."""
    limit = spec.train_limit if train else spec.test_limit
    geometry = preprocessing.resize_size, preprocessing.image_size, preprocessing.interpolation
    drawn_by = spec.seed if train and limit is not None else None
    parts = [spec.target, train, spec.root, dict(spec.kwargs), geometry, limit, drawn_by]
    key = json.dumps(parts, sort_keys=True, default=repr)
    if spec.in_memory and key in _PREPARED:
        _PREPARED.move_to_end(key)
        return _PREPARED[key]
    source, name = _source(spec, train), _name(train)
    indices = _chosen(len(source), limit, train, spec.seed)
    if not spec.in_memory:
        return item_split(source, indices, digests_folder, progress, name)
    with own_random_state(0):
        split = memory_split(source, indices, preprocessing, progress, name)
    logger.info("%d %s images in memory", len(indices), name)
    _PREPARED[key] = split
    if len(_PREPARED) > _PREPARED_MAX:
        _PREPARED.popitem(last=False)
    return split


def _source(spec: DataSpec, train: bool) -> Any:
    """What the dataset's callable returns: a dataset with at least one image."""
    callable_ = resolve_target(spec.target, "dataset._target_")
    with own_random_state(0):  # a random dataset gives the same whatever ran before in the process
        source = call_target(callable_, spec.target, "dataset.kwargs", spec.kwargs, train=train, root=spec.root)
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise UserError(
            f"dataset._target_={spec.target} returned a {type(source).__name__}; expected a dataset with a length and "
            "items (image, class)."
        )
    if not len(source):
        raise UserError(
            f"dataset._target_={spec.target} returned no {_name(train)} images; check dataset.root={spec.root}."
        )
    return source


def _name(train: bool) -> str:
    return "training" if train else "test"
