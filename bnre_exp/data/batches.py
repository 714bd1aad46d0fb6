"""Datasets of whole batches, in an order that only the seed decides.

A batch is fetched by ``(positions, seed)``: the sampler draws both, so augmentation depends neither on the number of
workers, nor on global random state, nor on what ran before in the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bnre_exp.data.geometry import finished
from bnre_exp.data.items import own_random_state, read_item
from bnre_exp.data.preprocess import (
    Preprocessing,
    as_channels,
    normalise,
    random_crop_and_flip,
    random_resized_crop_and_flip,
    resize_and_crop,
)
from bnre_exp.data.samples import Sample, TargetKind
from bnre_exp.errors import UserError, first_line

Batch = tuple[Tensor, Any]
BatchKey = tuple[list[int], int]


class SeededBatches(Sampler[BatchKey]):
    """Batches of ``(positions, seed of the batch)`` out of ``count``; every pass goes on with the same generator."""

    def __init__(self, count: int, batch_size: int, *, shuffle: bool, drop_last: bool, seed: int) -> None:
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        # A short last batch may be a single image, on which BN fails in training; the only batch is never dropped.
        self.drop_last = drop_last and count >= batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[BatchKey]:
        order = torch.randperm(self.count, generator=self.generator) if self.shuffle else torch.arange(self.count)
        # In order, every pass is the same one: what a random dataset gives must not depend on who looked before.
        generator = self.generator if self.shuffle else torch.Generator().manual_seed(self.seed)
        seeds = torch.randint(0, 2**62, (len(self),), generator=generator).tolist()
        for number, seed in enumerate(seeds):
            yield order[number * self.batch_size : (number + 1) * self.batch_size].tolist(), seed


class PreparedImages:
    """Images ``[N, C, H, W]`` (uint8), resized and cropped the first time that all of them are asked for."""

    def __init__(self, raw: Tensor, preprocessing: Preprocessing, is_done: bool = False) -> None:
        self._raw, self._preprocessing = raw, preprocessing
        self._prepared: Tensor | None = raw if is_done else None

    def all(self) -> Tensor:
        """Every image, ``[N, C, S, S]``; shared, never to be written to."""
        if self._prepared is None:
            self._prepared = resize_and_crop(self._raw, self._preprocessing).contiguous()
        return self._prepared

    def some(self, positions: Tensor) -> Tensor:
        """The images at ``positions`` alone."""
        if self._prepared is not None:
            return self._prepared[positions]
        return resize_and_crop(self._raw[positions], self._preprocessing)


class MemoryView(Dataset[Batch]):
    """Images in memory at ``positions``, as normalised batches."""

    def __init__(
        self, images: PreparedImages, labels: Tensor, positions: Tensor, preprocessing: Preprocessing, augment: bool
    ) -> None:
        self.prepared, self.labels, self.positions = images, labels, positions
        self.preprocessing, self.augment = preprocessing, augment

    @property
    def images(self) -> Tensor:
        """All prepared images, ``[N, C, S, S]`` (uint8, shared, never written to)."""
        return self.prepared.all()

    def look(self, count: int) -> Tensor:
        """The first ``count`` images, not augmented, normalised, without the others being prepared."""
        return normalise(self.prepared.some(self.positions[:count]), self.preprocessing)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, key: BatchKey) -> Batch:
        where, seed = self.positions[key[0]], key[1]
        images = self.images[where]
        if self.augment:
            images = random_crop_and_flip(images, torch.Generator().manual_seed(seed))
        return normalise(images, self.preprocessing), self.labels[where]


class _Reading(Dataset[Batch]):
    """Images ``indices`` of a dataset, read whenever they are asked for."""

    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def look(self, count: int) -> Tensor:
        """The first ``count`` images as the view gives them."""
        return self._read((list(range(count)), 0))[0]

    def __getitems__(self, key: BatchKey) -> Batch | UserError:
        """A batch, or the user's mistake in it, which :class:`Batches` raises: torch would put the traceback of a
        worker process into its message."""
        try:
            return self._read(key)
        except UserError as error:
            return error

    def _read(self, key: BatchKey) -> Batch:
        raise NotImplementedError


class ItemView(_Reading):
    """Items ``indices`` of a dataset, read and resized whenever they are asked for, as normalised batches.

    num_classes: every class must lie below it; None: any integer.
    """

    def __init__(
        self, source: Any, indices: Tensor, preprocessing: Preprocessing, augment: bool, num_classes: int | None
    ) -> None:
        self.source, self.indices, self.num_classes = source, indices, num_classes
        self.preprocessing, self.augment = preprocessing, augment

    def _read(self, key: BatchKey) -> Batch:
        images, labels = [], []
        with own_random_state(key[1]):
            for index in self.indices[key[0]].tolist():
                image, label = read_item(self.source, index, self.num_classes)
                crop = random_resized_crop_and_flip if self.augment else resize_and_crop
                images.append(as_channels(crop(image, self.preprocessing), self.preprocessing.channels))
                labels.append(label)
        return normalise(torch.stack(images), self.preprocessing), torch.tensor(labels)


class SampleView(_Reading):
    """Samples ``indices`` of those that ``read`` gives, fitted already, as batches of normalised images and targets."""

    def __init__(
        self,
        read: Callable[[int], Sample],
        indices: Tensor,
        kind: TargetKind,
        preprocessing: Preprocessing,
        augment: bool,
    ) -> None:
        self.read, self.indices, self.kind = read, indices, kind
        self.preprocessing, self.augment = preprocessing, augment

    def _read(self, key: BatchKey) -> Batch:
        with own_random_state(key[1]):
            samples = [self.read(index) for index in self.indices[key[0]].tolist()]
            samples = [finished(sample, self.preprocessing, self.augment) for sample in samples]
        images = [as_channels(sample["image"].as_subclass(Tensor), self.preprocessing.channels) for sample in samples]
        return normalise(torch.stack(images), self.preprocessing), self.kind.collate(samples)


class Batches(DataLoader[Batch]):
    """A loader of whole batches, which tells a user's mistake alike whichever process meets it."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"A data-loading process died ({first_line(error).rstrip('.')}). It may have run out of memory: use "
                "fewer processes, as in runtime.workers=0, or smaller batches."
            ) from error
