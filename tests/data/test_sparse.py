"""Data of which few samples show something are not taken for empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bnre_exp.data import DataSpec, Preprocessing, build_loaders

COUNT, ONLY = 150, 101  # of the samples that are looked at to know the data, none is this one


def sparse(train: bool, root: str | None = None, targets: str = "mask") -> list[Any]:
    """Images, of which one has an object."""
    image, items = torch.zeros(3, 8, 8, dtype=torch.uint8), list[Any]()
    for index in range(COUNT):
        shows = int(index == ONLY)
        boxes = torch.tensor([[1.0, 1.0, 5.0, 5.0]] * shows).reshape(-1, 4)
        objects = {"boxes": boxes, "labels": torch.zeros(shows, dtype=torch.int64)}
        items.append((image, objects if targets == "objects" else torch.full((8, 8), 2 * shows, dtype=torch.uint8)))
    return items


@pytest.mark.parametrize(("targets", "seen"), [("objects", (0, 0)), ("mask", (0, 2))])
def test_the_one_sample_that_shows_something_is_found(targets: str, seen: tuple[int, int]) -> None:
    how = Preprocessing(8, 8, (0.0,) * 3, (1.0,) * 3, fit="pad")
    options: dict[str, Any] = {"batch_size": 4, "eval_batch_size": 4, "val_fraction": 0.0, "in_memory": False}
    spec = DataSpec("tests.data.test_sparse.sparse", targets=targets, num_classes=3, **options)
    assert build_loaders(spec, preprocessing=how).label_range == {"train": seen, "test": seen}
