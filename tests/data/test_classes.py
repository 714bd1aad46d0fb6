"""How many classes there are is counted, and a number that was given is held against what the dataset shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image

from bnre_exp.data import DataSpec, ImageTensors, Preprocessing, build_loaders
from bnre_exp.data.classes import count_classes
from bnre_exp.errors import UserError
from bnre_exp.models.build import build_model

FOLDER = "bnre_exp.data.image_folder"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("ant", "bee", "cow"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                Image.new("L", (8, 8), 20 * index).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def own(train: bool, root: str | None, labels: int = 4, names: int = 0, test_names: int = 0) -> Any:
    """A user's own dataset, which lists classes as the test wants."""
    dataset = ImageTensors(torch.zeros(12, 1, 8, 8, dtype=torch.uint8), torch.arange(12) % labels)
    count = names if train else test_names or names
    if count:
        dataset.classes = [f"class {number}" for number in range(count)]  # type: ignore[attr-defined]
    return dataset


def unlisted(train: bool, root: str | None) -> list[tuple[torch.Tensor, int]]:
    return [(torch.zeros(1, 8, 8, dtype=torch.uint8), number % 4) for number in range(12)]


def renumbered(train: bool, root: str | None) -> torchvision.datasets.ImageFolder:
    return torchvision.datasets.ImageFolder(
        str(Path(root or "", "train" if train else "val")), target_transform=lambda label: 100 + label
    )


@pytest.mark.parametrize(
    ("target", "kwargs", "expected"),
    [
        (FOLDER, {}, 3),
        ("bnre_exp.data.digits", {}, 10),
        ("bnre_exp.data.fashion_mnist", {}, 10),
        ("bnre_exp.data.cifar10", {}, 10),
        ("bnre_exp.data.cifar100", {}, 100),
        ("bnre_exp.data.imagenet", {}, 1000),
        (f"{__name__}.own", {}, 4),
        (f"{__name__}.own", {"names": 6}, 6),
        (f"{__name__}.own", {"labels": 1}, None),
        (f"{__name__}.unlisted", {}, None),
        (f"{__name__}.renumbered", {}, 103),
    ],
)
def test_classes_are_counted(folder: Path, target: str, kwargs: dict[str, Any], expected: int | None) -> None:
    assert count_classes(DataSpec(target, root=str(folder), kwargs=kwargs)) == expected


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        (FOLDER, 10, r"num_classes=10, but dataset\.root=.* has class folders ant, bee, cow: 3 of them.*num_classes=3"),
        (FOLDER, 2, r"num_classes=2, but .*: 3 of them"),
        ("bnre_exp.data.digits", 5, r"num_classes=5: digits has 10 classes"),
        ("bnre_exp.data.cifar100", 10, r"num_classes=10: cifar100 has 100 classes"),
    ],
)
def test_another_number_than_there_are_is_refused(folder: Path, target: str, given: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        count_classes(DataSpec(target, root=str(folder), num_classes=given))


def test_what_a_users_dataset_names_is_held_against_the_number() -> None:
    def build(num_classes: int | None, **kwargs: Any) -> Any:
        spec = DataSpec(f"{__name__}.own", kwargs=kwargs, num_classes=num_classes, batch_size=4)
        return build_loaders(spec, preprocessing=Preprocessing(8, 8, (0.0,) * 3, (1.0,) * 3))

    build(6, names=6)
    build(1000)  # a network of ImageNet's classes, and images of some of them
    with pytest.raises(
        UserError, match=r"num_classes=10, but the training images of .*own have classes class 0, .*: 6"
    ):
        build(10, names=6)
    with pytest.raises(UserError, match=r"num_classes=6, but the test images of"):
        build(6, names=6, test_names=7)


def test_one_class_folder_is_too_few(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
    with pytest.raises(UserError, match="one class folder, ant; expected at least 2"):
        count_classes(DataSpec(FOLDER, root=str(tmp_path)))


def test_a_network_that_needs_the_number_says_so() -> None:
    with pytest.raises(UserError, match=r"dataset\.num_classes is not set"):
        build_model("bnre_exp.models.torchvision_model", name="resnet18", num_classes=None)
    assert build_model("torch.nn.Flatten", num_classes=None).module is not None
