"""Which dataset is opened for a split, which of its images are used, and what is kept of it for other jobs."""

from __future__ import annotations

import inspect
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from torchvision.datasets.folder import default_loader

from bnre_exp.data.items import file_states, own_random_state
from bnre_exp.data.listed import listed_classes, listed_files, listed_labels
from bnre_exp.data.pictures import open_rgb
from bnre_exp.data.preprocess import Preprocessing
from bnre_exp.data.reading import Split, are_settled, digest_of, item_split, memory_split, sample_split
from bnre_exp.data.samples import CLASS
from bnre_exp.data.spec import DataSpec
from bnre_exp.digests import stream_seed
from bnre_exp.errors import UserError
from bnre_exp.progress import Progress
from bnre_exp.targets import call_target, resolve_target, what_failed

logger = logging.getLogger(__name__)

# Prepared splits of this process, by what they were made of: train and test of two datasets, so that jobs of a sweep do
# not prepare them anew.
_PREPARED: OrderedDict[str, Split] = OrderedDict()
_PREPARED_MAX = 4


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
    classes = listed_classes(source)
    check_classes(classes, spec.num_classes, f"the {name} images of {spec.target} have classes")
    indices = _chosen(len(source), limit, train, spec.seed)
    return replace(
        _split(spec, source, indices, preprocessing, digests_folder, progress, name),
        classes=tuple(classes) if classes else None,
    )


def _split(
    spec: DataSpec, source: Any, indices: Tensor, preprocessing: Preprocessing, digests_folder: Path | None,
    progress: Progress, name: str,
) -> Split:  # fmt: skip
    if spec.targets != CLASS:
        return sample_split(spec, source, indices, preprocessing, digests_folder, progress, name)
    if not spec.in_memory:
        return item_split(source, indices, digests_folder, progress, name)
    key = _files_key(spec, source, indices, preprocessing)
    if key is None or key not in _PREPARED:
        with own_random_state(0):
            split = memory_split(source, indices, preprocessing, progress, name)
        logger.info("%d %s images in memory", len(indices), name)
        key = key or digest_of([split.digest, indices.numpy()])
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
    return digest_of(parts) if are_settled(states) else None


def open_source(spec: DataSpec, train: bool) -> Any:
    """What the dataset's callable returns: a dataset with at least one image."""
    callable_ = resolve_target(spec.target, "dataset._target_")
    with own_random_state(0):  # a random dataset gives the same whatever ran before in the process
        told = {"targets": spec.targets} if _takes_targets(callable_) else {}
        source = call_target(callable_, spec.target, "dataset.kwargs", spec.kwargs, train=train, root=spec.root, **told)
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


def _takes_targets(callable_: Any) -> bool:
    """Whether a dataset serves several tasks, and wants to know which."""
    try:
        return "targets" in inspect.signature(callable_).parameters
    except (TypeError, ValueError):
        return False


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
