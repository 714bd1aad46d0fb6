"""Seeded data loaders by role: train, calibration, reestimation, validation, test.

Validation is split off the training data by the seed; calibration and re-estimation draw from what remains, without
augmentation; test data are only ever evaluated on. Datasets are callables ``f(train: bool, root, **kwargs)``: those
that come along and a user's own alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bnre_exp.data.batches import Batch, Batches, MemoryView, SeededBatches
from bnre_exp.data.preprocess import Preprocessing
from bnre_exp.data.spec import DataSpec
from bnre_exp.data.splits import Split, load_split
from bnre_exp.digests import digest, stream_seed, tensors_digest
from bnre_exp.errors import UserError, few
from bnre_exp.progress import Progress, no_progress
from bnre_exp.tasks.classification import Classification


@dataclass(frozen=True)
class Loaders:
    """Loaders by role, each giving ``(float32 [N, C, H, W], targets)``, and what is known about their data.

    Targets are classes, int64 ``[N]``, or what ``DataSpec.targets`` says: masks int64 ``[N, H, W]``, images float32
    ``[N, C, H, W]`` in [0, 1], keypoints ``[N, K, 3]``, objects: a list of N dicts of boxes ``[n, 4]``, labels
    ``[n]``, and, where the dataset has them, masks ``[n, H, W]`` and keypoints ``[n, K, 3]``.

    ``indices``: by role, into the split that the dataset's callable returned (int64 ``[N]``). ``digests``: of the
    contents of the ``train`` and ``test`` split. ``num_classes_seen``: different classes among the training images.
    ``label_range``: smallest and largest class by split, of those that were seen; no entry where there are none.
    ``classes``: their names, None where the dataset names none. ``identity``: digest of all that decides the batches
    but the seed. ``preprocessing``: of images. ``notes``: what a reader of results should know about the data.
    """

    train: DataLoader[Batch]
    calibration: DataLoader[Batch]
    reestimation: DataLoader[Batch]
    validation: DataLoader[Batch] | None
    test: DataLoader[Batch]
    indices: Mapping[str, Tensor]
    digests: Mapping[str, str]
    num_classes_seen: int
    label_range: Mapping[str, tuple[int, int]]
    classes: tuple[str, ...] | None
    recipes: Mapping[str, Callable[[], DataLoader[Batch]]]
    identity: str
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()

    def fresh(self, role: str) -> DataLoader[Batch]:
        """A new loader of ``role`` whose random order and augmentation start from the seed again.

        Two fresh loaders give the same batches. Raises KeyError where there is no such role (``validation`` of a
        ``val_fraction`` of 0).
        """
        return self.recipes[role]()

    def example(self) -> Tensor:
        """Two training images ``[2, C, H, W]``, not augmented; always the same for the same build."""
        dataset: Any = self.calibration.dataset
        images: Tensor = dataset.look(2)
        return images


def build_loaders(
    spec: DataSpec,
    *,
    preprocessing: Preprocessing,
    progress: Progress = no_progress,
    digests_folder: Path | None = None,
) -> Loaders:
    """Build the dataset that ``spec`` names, and its loaders.

    Batches of ``batch_size`` are full, unless there is not even one; those of ``eval_batch_size`` (validation, test)
    cover every image, in order. Files are read to tell their contents; in ``digests_folder`` it is remembered what
    they held, for as long as their sizes and times stay. Raises UserError for a dataset that is not there, is empty,
    has other classes than ``spec.num_classes``, lists files that cannot be read, or returns something else than (PIL
    image or uint8 tensor, class, or another target of the kind ``spec.targets``).
    """
    splits = {
        name: load_split(
            spec, name == "train", preprocessing=preprocessing, progress=progress, digests_folder=digests_folder
        )
        for name in ("train", "test")
    }
    _check_same_classes(splits["train"].classes, splits["test"].classes)
    positions = _positions(spec, splits)
    recipes = {
        role: partial(
            _loader,
            splits[_split_of(role)].view(where, preprocessing, _is_augmented(spec, role), spec.num_classes),
            role,
            spec,
        )
        for role, where in positions.items()
    }
    indices = {role: splits[_split_of(role)].indices[where] for role, where in positions.items()}
    digests = {name: split.digest for name, split in splits.items()}
    settings = [spec.batch_size, spec.eval_batch_size, spec.in_memory, spec.augment, spec.targets]
    settings.append(preprocessing.describe())
    return Loaders(
        train=recipes["train"](),
        calibration=recipes["calibration"](),
        reestimation=recipes["reestimation"](),
        validation=recipes["validation"]() if "validation" in recipes else None,
        test=recipes["test"](),
        indices=indices,
        digests=digests,
        num_classes_seen=len(splits["train"].labels.unique()),
        label_range={
            name: (int(split.labels.min()), int(split.labels.max()))
            for name, split in splits.items()
            if len(split.labels)
        },
        classes=splits["train"].classes,
        recipes=recipes,
        identity=digest([digests, tensors_digest(indices), settings]),
        preprocessing=preprocessing,
        notes=tuple(dict.fromkeys(note for split in splits.values() for note in split.notes)),
    )


def _check_same_classes(of_train: Sequence[str] | None, of_test: Sequence[str] | None) -> None:
    if of_train is not None and of_test is not None and of_train != of_test:
        raise UserError(
            f"dataset: the training images have the classes {few(of_train)}, the test images {few(of_test)}; expected "
            "the same, in the same order."
        )


def check_labels(loaders: Loaders, num_classes: int) -> None:
    """Raise UserError unless every class lies in ``[0, num_classes)``."""
    Classification(num_classes).check_labels(loaders.label_range)


def _split_of(role: str) -> str:
    return "test" if role == "test" else "train"


def _is_augmented(spec: DataSpec, role: str) -> bool:
    return spec.augment and role == "train"


def _loader(view: Any, role: str, spec: DataSpec) -> DataLoader[Batch]:
    if spec.workers and isinstance(view, MemoryView):
        view.prepared.all()  # once, and not in every process
    is_evaluated = role in ("validation", "test")
    size = spec.eval_batch_size if is_evaluated else spec.batch_size
    stream = stream_seed(spec.seed, role)
    batches: Any = SeededBatches(len(view), size, shuffle=not is_evaluated, drop_last=not is_evaluated, seed=stream)
    return Batches(
        view,
        batch_sampler=batches,
        num_workers=spec.workers,
        collate_fn=_as_fetched,
        pin_memory=spec.pin_memory,
        # Workers are seeded from this one; without it, every pass would draw from torch's global generator.
        generator=torch.Generator().manual_seed(stream),
    )


def _as_fetched(batch: Any) -> Any:
    return batch


def _positions(spec: DataSpec, splits: Mapping[str, Split]) -> dict[str, Tensor]:
    """By role, positions among the images of its split; no ``validation`` where nothing is held out."""
    kept, held_out = _held_out(len(splits["train"].indices), spec)
    everything = torch.arange(len(splits["test"].indices))
    validation = {"validation": held_out} if len(held_out) else {}
    return {"train": kept, "calibration": kept, "reestimation": kept, **validation, "test": everything}


def _held_out(count: int, spec: DataSpec) -> tuple[Tensor, Tensor]:
    """(kept, held out) positions of ``count`` training images, ascending and disjoint."""
    held = max(1, round(count * spec.val_fraction)) if spec.val_fraction > 0 else 0
    if count - held < 2:
        raise UserError(
            f"dataset: {count} training images less {held} for validation leave fewer than 2, which BN cannot be "
            "trained on; raise dataset.train_limit or lower dataset.val_fraction."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(stream_seed(spec.seed, "validation split")))
    return order[held:].sort().values, order[:held].sort().values
