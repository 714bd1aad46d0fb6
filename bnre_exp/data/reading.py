"""One split of a dataset, read in one of three ways: into memory, item by item, or as samples with targets."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from bnre_exp.data.batches import ItemView, MemoryView, PreparedImages, SampleView
from bnre_exp.data.checking import check_targets
from bnre_exp.data.datasets import ImageTensors
from bnre_exp.data.items import file_states, own_random_state, read_fitted, read_item, reading_problem, refuse_files
from bnre_exp.data.listed import files_of, listed_files, listed_labels
from bnre_exp.data.pictures import check_header, open_picture, open_rgb
from bnre_exp.data.preprocess import Preprocessing, as_channels, resize_and_crop
from bnre_exp.data.samples import KINDS, Sample, TargetKind
from bnre_exp.data.spec import DataSpec
from bnre_exp.digests import file_sha256
from bnre_exp.files import replacing
from bnre_exp.progress import Progress

# Labels that a dataset does not list are looked up for this many images, and so are contents for its digest.
_SAMPLED_ITEMS = 64

# A file that changes twice within a tick of the file system's clock (two seconds on some) has one time of change.
_CLOCK_TICK = 2 * 10**9  # [ns]

_NO_PICTURES = (".json", ".txt", ".xml", ".yaml", ".yml")  # files of targets


@dataclass(frozen=True)
class Split:
    """One split: which images of the source are used, their classes, and a digest of their contents.

    ``indices``: ``[N]`` into the source, ascending. ``labels``: int64 ``[N]``, or fewer where the source does not
    list them and they were sampled. ``images``: if in memory, else None and ``source`` is read.
    ``kind``, ``read``: of targets that are more than a class: what they are, and the sample of an index into the
    source; ``labels`` are then all classes that are in them. ``classes``: their names, None where they have none.
    ``notes``: what the digest does not cover.
    """

    indices: Tensor
    labels: Tensor
    digest: str
    source: Any = None
    images: PreparedImages | None = None
    kind: TargetKind | None = None
    read: Callable[[int], Sample] | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def view(
        self, positions: Tensor, preprocessing: Preprocessing, augment: bool, num_classes: int | None
    ) -> MemoryView | ItemView | SampleView:
        """The images at ``positions`` (into ``indices``) as a dataset of batches."""
        if self.kind is not None and self.read is not None:
            return SampleView(self.read, self.indices[positions], self.kind, preprocessing, augment)
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
    return Split(indices, labels, digest_of(parts), images=prepared)


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
        return Split(indices, labels[indices], digest_of([contents, labels[indices].numpy()]), source=source)
    sampled = indices[:: max(1, len(indices) // _SAMPLED_ITEMS)].tolist()
    with own_random_state(0):
        items = [read_item(source, index) for index in sampled]
    seen = torch.tensor([label for _, label in items]) if labels is None else labels[indices]
    parts = [str(len(indices)), *(image.numpy() for image, _ in items), seen.numpy()]
    return Split(indices, seen, digest_of(parts), source=source, notes=(_unlisted(name, len(sampled)),))


def sample_split(
    spec: DataSpec, source: Any, indices: Tensor, preprocessing: Preprocessing, digests_folder: Path | None,
    progress: Progress, name: str,
) -> Split:  # fmt: skip
    """Samples ``indices``, whose targets are more than a class: read once into memory, or whenever they are needed."""
    kind = KINDS[spec.targets]
    read = partial(read_fitted, source, kind=kind, num_classes=spec.num_classes, how=preprocessing)
    if spec.in_memory:
        with own_random_state(0):
            shown = progress(indices.tolist(), f"reading {name} images", len(indices))
            samples = {index: read(index) for index in shown}
        labels = torch.cat([kind.labels_of(sample) for sample in samples.values()])
        digest = digest_of([_geometry(preprocessing), *_sample_parts(list(samples.values()))])
        return Split(indices, labels, digest, kind=kind, read=samples.__getitem__)
    sampled = indices[:: max(1, len(indices) // _SAMPLED_ITEMS)].tolist()
    with own_random_state(0):
        seen = [read(index) for index in sampled]
        if kind.labels is not None and not any(_shows_something(kind, sample) for sample in seen):
            looked_at = set(sampled)  # objects may be rare
            left = (read(index) for index in indices.tolist() if index not in looked_at)
            seen += [next((sample for sample in left if _shows_something(kind, sample)), seen[0])]
    labels, notes = torch.cat([kind.labels_of(sample) for sample in seen]), list[str]()
    files = files_of(source, indices.tolist())
    if files is None:
        contents = digest_of(_sample_parts(seen))
        notes.append(_unlisted(name, len(sampled)))
    else:
        contents = _files_digest(files, True, digests_folder, progress, name)
        check_targets(source, indices.tolist(), kind, spec.num_classes, contents, digests_folder, progress, name)
    digest = digest_of([contents, indices.numpy()])
    return Split(indices, labels, digest, source=source, kind=kind, read=read, notes=tuple(notes))


def _shows_something(kind: TargetKind, sample: Sample) -> bool:
    """Whether a sample has an object, or a class beside the background."""
    labels = kind.labels_of(sample)
    return bool(labels.any()) if kind.name == "mask" else len(labels) > 0


def _sample_parts(samples: Sequence[Sample]) -> list[Any]:
    """Samples as what a digest is made of."""
    parts = list[Any]()
    for name, value in (entry for sample in samples for entry in sorted(sample.items())):
        parts += [name, *_value_parts(value)]
    return parts


def _value_parts(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        value = value.as_subclass(Tensor).numpy()
    if isinstance(value, np.ndarray):  # whose repr leaves out what is in the middle
        return [f"{value.dtype} {list(value.shape)}", value if value.dtype != object else repr(value.tolist())]
    if isinstance(value, Mapping):
        return [part for key in value for part in (repr(key), *_value_parts(value[key]))]
    if isinstance(value, (tuple, list)):
        return [f"{len(value)}", *(part for item in value for part in _value_parts(item))]
    return [repr(value)]


def _unlisted(name: str, count: int) -> str:
    return (
        f"the {name} images are not kept in memory and list no files: they are known by {count} samples. After a "
        "change of the others, run with store.mode=refresh"
    )


def _geometry(how: Preprocessing) -> str:
    return str([how.resize_size, how.image_size, how.interpolation, how.fit])


def _files_digest(paths: Sequence[Path], has_pictures: bool, folder: Path | None, progress: Progress, name: str) -> str:
    """Digest of the files' names and contents; remembered in ``folder`` by their sizes and times of change.

    Raises UserError for files that cannot be read, or have no picture in them where they should.
    """
    root = os.path.commonpath([path.parent for path in paths])
    states = file_states(paths)
    seen = [f"{path} {' '.join(map(str, state))}" for path, state in zip(paths, states)]
    known = folder / digest_of(seen) if folder is not None and are_settled(states) else None
    if known is not None:
        with suppress(OSError):
            return known.read_text()
    lines, wrong = list[str](), dict[Path, str]()
    for path in progress(paths, f"reading {name} files, to know their contents", len(paths)):
        is_picture = has_pictures and path.suffix.lower() not in _NO_PICTURES
        problem = reading_problem(check_header, path) if is_picture else None
        try:
            lines.append(f"{os.path.relpath(path, root)} {file_sha256(path)}")
        except OSError as error:
            problem = str(error)
        if problem is not None:
            wrong[path] = problem
    refuse_files(wrong, len(paths))
    contents = digest_of(lines)
    if known is not None:
        with suppress(OSError), replacing(known) as new:  # a folder that may only be read
            new.write_text(contents)
    return contents


def are_settled(states: Sequence[tuple[int, ...]]) -> bool:
    """Whether another change of the files would show in their times of change."""
    return max(changed for _, _, changed, _ in states) < time.time_ns() - _CLOCK_TICK


def digest_of(parts: Sequence[Any]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() + b"\n" if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
    return sha.hexdigest()
