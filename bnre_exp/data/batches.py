"""Datasets of whole batches, in an order that only the seed decides.

A batch is fetched by ``(positions, seed)``: the sampler draws both, so augmentation depends neither on the number of
workers, nor on global random state, nor on what ran before in the process.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from bnre_exp.data.preprocess import (
    Preprocessing,
    as_channels,
    normalise,
    random_crop_and_flip,
    random_resized_crop_and_flip,
    resize_and_crop,
    to_uint8,
)
from bnre_exp.errors import UserError

Batch = tuple[Tensor, Tensor]
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


class ItemView(Dataset[Batch]):
    """Items ``indices`` of a dataset, read and resized whenever they are asked for, as normalised batches."""

    def __init__(self, source: Any, indices: Tensor, preprocessing: Preprocessing, augment: bool) -> None:
        self.source, self.indices = source, indices
        self.preprocessing, self.augment = preprocessing, augment

    def __len__(self) -> int:
        return len(self.indices)

    def look(self, count: int) -> Tensor:
        """The first ``count`` images as the view gives them."""
        return self.__getitems__((list(range(count)), 0))[0]

    def __getitems__(self, key: BatchKey) -> Batch:
        images, labels = [], []
        with own_random_state(key[1]):
            for index in self.indices[key[0]].tolist():
                image, label = read_item(self.source, index)
                crop = random_resized_crop_and_flip if self.augment else resize_and_crop
                images.append(as_channels(crop(image, self.preprocessing), self.preprocessing.channels))
                labels.append(label)
        return normalise(torch.stack(images), self.preprocessing), torch.tensor(labels)


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


def read_item(source: Any, index: int) -> tuple[Tensor, int]:
    """Item ``index`` as (uint8 ``[C, H, W]``, class); UserError where it cannot be read or is something else."""
    try:
        item = source[index]
    except OSError as error:
        samples = getattr(source, "samples", None)
        name = f" ({samples[index][0]})" if samples else ""
        raise UserError(f"dataset: image {index}{name} cannot be read: {error}. Repair or remove the file.") from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise UserError(f"dataset: item {index} is a {type(item).__name__}; expected a pair (image, class number).")
    try:
        return to_uint8(item[0]), int(item[1])
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"dataset: the class of item {index} is {item[1]!r}; expected an integer.") from error
