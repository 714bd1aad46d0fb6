"""What to load, and how to batch it: the library's description of a dataset and its loaders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataSpec:
    """A dataset, and how its loaders give it.

    target: dotted path of a callable ``f(train: bool, root, **kwargs)`` that returns one split.
    root: folder of its files; None: the dataset's own default. kwargs: its other keyword arguments.
    targets: what the task takes: "class", or one of ``bnre_exp.data.samples.KINDS``. A callable that has a parameter
    ``targets`` is told.
    num_classes: classes are 0 to ``num_classes - 1``, which is checked against what the dataset names and as items are
    read; None: any integers.
    seed: everything random depends on it and the role alone.
    batch_size: images a batch for training, calibration and re-estimation; eval_batch_size: for validation and test.
    val_fraction: part of the training images that is held out for validation, in [0, 1).
    train_limit: use this many training images, drawn by the seed; test_limit: this many test images, evenly spaced.
    None: all.
    in_memory: keep the resized images in memory, else read them anew. augment: crop and flip training images.
    workers: data-loading processes, 0: this one. pin_memory: as torch's ``DataLoader`` has it.
    """

    target: str
    root: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch_size: int = 128
    eval_batch_size: int = 256
    val_fraction: float = 0.1
    train_limit: int | None = None
    test_limit: int | None = None
    in_memory: bool = True
    augment: bool = False
    workers: int = 0
    pin_memory: bool = False
    num_classes: int | None = None
    targets: str = "class"
