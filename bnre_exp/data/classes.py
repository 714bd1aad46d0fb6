"""How many classes a dataset has, told without reading its images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bnre_exp.data.datasets import cifar10, cifar100, digits, fashion_mnist, folder_classes, image_folder, imagenet
from bnre_exp.data.listed import listed_classes, listed_labels
from bnre_exp.data.samples import CLASS, KINDS
from bnre_exp.data.spec import DataSpec
from bnre_exp.data.splits import check_classes, open_source
from bnre_exp.errors import UserError
from bnre_exp.targets import resolve_target

# Of those that come along, without looking at their files: they may have to be downloaded.
_KNOWN: dict[Callable[..., Any], int] = {digits: 10, fashion_mnist: 10, cifar10: 10, cifar100: 100, imagenet: 1000}


def count_classes(spec: DataSpec) -> int | None:
    """The number of classes of a dataset: ``spec.num_classes``, or, where that is None, what the dataset shows.

    An image folder shows it by its class folders, a user's own dataset by the names in its ``classes``, or by the
    largest class in its ``targets`` or ``labels``; None where that shows no two classes. Raises UserError where
    ``spec.num_classes`` is not what an image folder or a dataset that comes along has.
    """
    target = resolve_target(spec.target, "dataset._target_")
    if spec.targets != CLASS and KINDS[spec.targets].labels is None:
        return spec.num_classes
    if target is image_folder:
        names = folder_classes(spec.root)
        check_classes(names, spec.num_classes, f"dataset.root={spec.root} has class folders")
        if len(names) < 2:
            raise UserError(f"dataset.root={spec.root} has one class folder, {names[0]}; expected at least 2.")
        return len(names)
    if target in _KNOWN:
        if spec.num_classes not in (None, _KNOWN[target]):
            raise UserError(
                f"dataset.num_classes={spec.num_classes}: {spec.target.rpartition('.')[2]} has {_KNOWN[target]} "
                "classes. Leave dataset.num_classes out."
            )
        return _KNOWN[target]
    if spec.num_classes is not None:
        return spec.num_classes
    source = open_source(spec, train=True)
    named, labels = listed_classes(source), listed_labels(source)
    count = len(named) if named is not None else 0 if labels is None else int(labels.max()) + 1
    return count if count > 1 else None  # one class is none: such data are for another task than classification
