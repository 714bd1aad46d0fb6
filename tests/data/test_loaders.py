"""Datasets and loaders: what is in which role, that the seed alone decides the batches, and what the errors say."""

from __future__ import annotations

import gzip
import random
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bnre_exp import data
from bnre_exp.data import DataSpec, ImageTensors, Loaders, Preprocessing, build_loaders, check_labels, datasets, splits
from bnre_exp.data.preprocess import normalise, random_crop_and_flip, resize_and_crop, resolve_preprocessing, to_uint8
from bnre_exp.errors import UserError

PLAIN = Preprocessing(32, 32, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2))
UNREACHABLE = "http://127.0.0.1:9/"


class PilRgb(Dataset[Any]):
    """A user's own dataset: 23 PIL images of unequal sizes, whose transform draws from Python's global generator."""

    def __init__(self, train: bool, root: str | None, jitter: bool = False, first_class: int = 0) -> None:
        self.offset, self.jitter, self.first_class = 0 if train else 100, jitter, first_class

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        rng = np.random.RandomState(index + self.offset)
        pixels = rng.randint(0, 200, (40 + index, 50, 3)).astype(np.uint8)
        if self.jitter:
            pixels = pixels + random.randrange(50)
        return Image.fromarray(pixels.astype(np.uint8)), index % 3 + self.first_class


def digits_loaders(preprocessing: Preprocessing = PLAIN, **changes: Any) -> Loaders:
    options: dict[str, Any] = {"target": "bnre_exp.data.digits", "seed": 3, "batch_size": 64, "eval_batch_size": 100}
    return build_loaders(DataSpec(**{**options, **changes}), preprocessing=preprocessing)


def pil_loaders(**changes: Any) -> Loaders:
    return digits_loaders(target=f"{__name__}.PilRgb", batch_size=5, eval_batch_size=5, **changes)


def batches(loader: Any) -> list[tuple[Tensor, Tensor]]:
    return list(loader)


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, second, strict=True)
    )


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A root without data, nothing installed, and downloads that cannot reach anyone."""
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", str(tmp_path / "absent"))
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [UNREACHABLE])
    for cifar in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
        monkeypatch.setattr(cifar, "url", UNREACHABLE + "cifar.tar.gz")
    return tmp_path


# Roles


def test_validation_is_disjoint_from_all_that_trains_and_everything_is_used() -> None:
    loaders = digits_loaders()
    indices = {role: set(where.tolist()) for role, where in loaders.indices.items()}
    assert indices["train"] == indices["calibration"] == indices["reestimation"]
    assert not indices["train"] & indices["validation"]
    assert indices["train"] | indices["validation"] == set(range(len(data.digits(True))))
    assert len(indices["validation"]) == round(0.1 * len(data.digits(True)))
    assert indices["test"] == set(range(len(data.digits(False))))
    assert set(digits_loaders(seed=4).indices["validation"].tolist()) != indices["validation"]


def test_indices_say_which_images_a_loader_gives() -> None:
    loaders = digits_loaders(val_fraction=0.2, train_limit=300)
    labels = torch.cat([label for _, label in loaders.validation or []])
    assert torch.equal(labels, data.digits(True).labels[loaders.indices["validation"]])
    assert len(loaders.indices["train"]) == 240


def test_no_validation_split() -> None:
    loaders = digits_loaders(val_fraction=0.0)
    assert loaders.validation is None
    assert "validation" not in loaders.indices
    assert len(loaders.indices["train"]) == len(data.digits(True))


def test_training_batches_are_full_and_evaluation_covers_every_image_in_order() -> None:
    loaders = digits_loaders()
    count = len(loaders.indices["train"])
    for loader in (loaders.train, loaders.calibration, loaders.reestimation):
        sizes = [len(label) for _, label in loader]
        assert sizes == [64] * (count // 64) == [64] * len(loader)
    assert count % 64
    test = data.digits(False)
    assert torch.equal(torch.cat([label for _, label in loaders.test]), test.labels)
    assert [len(label) for _, label in loaders.test] == [100, 100, 100, len(test) - 300]


def test_less_than_one_batch_is_kept() -> None:
    loaders = digits_loaders(train_limit=20, val_fraction=0.1)
    assert [len(label) for _, label in loaders.train] == [18]


def test_limits() -> None:
    loaders = digits_loaders(train_limit=50, test_limit=30, seed=1)
    assert len(loaders.indices["train"]) + len(loaders.indices["validation"]) == 50
    assert len(loaders.indices["test"]) == 30
    other = digits_loaders(train_limit=50, test_limit=30, seed=2)
    assert torch.equal(loaders.indices["test"], other.indices["test"])
    assert loaders.digests["test"] == other.digests["test"]
    assert loaders.digests["train"] != other.digests["train"]
    with pytest.raises(UserError, match=r"fewer than 2.*train_limit"):
        digits_loaders(train_limit=2, val_fraction=0.5)


# Seeds


def test_same_seed_gives_same_batches_whatever_ran_before() -> None:
    first = digits_loaders(augment=True)
    expected = {role: batches(first.fresh(role)) for role in ("train", "calibration", "reestimation")}
    torch.manual_seed(99)
    batches(digits_loaders(seed=8, augment=True).train)
    torch.rand(7)
    second = digits_loaders(augment=True)
    for role, values in expected.items():
        assert same(values, batches(getattr(second, role)))
    assert not same(expected["calibration"], expected["reestimation"])
    assert not same(expected["calibration"], batches(digits_loaders(seed=4).calibration))


def test_passes_differ_and_a_fresh_loader_starts_again() -> None:
    loaders = digits_loaders(augment=True)
    first, second = batches(loaders.train), batches(loaders.train)
    assert not same(first, second)
    again = loaders.fresh("train")
    assert same(first, batches(again))
    assert same(second, batches(again))
    with pytest.raises(KeyError):
        digits_loaders(val_fraction=0.0).fresh("validation")


@pytest.mark.parametrize("in_memory", [True, False])
def test_loading_leaves_the_global_generators_alone(in_memory: bool) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    loaders = pil_loaders(in_memory=in_memory, augment=True)
    for loader in (loaders.train, loaders.test):
        batches(loader)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


@pytest.mark.parametrize("in_memory", [True, False])
def test_workers_give_the_same_batches(in_memory: bool) -> None:
    alone = pil_loaders(in_memory=in_memory, augment=True, kwargs={"jitter": not in_memory})
    helped = pil_loaders(in_memory=in_memory, augment=True, kwargs={"jitter": not in_memory}, workers=2)
    for _ in range(2):
        assert same(batches(alone.train), batches(helped.train))


def test_a_users_random_transform_is_seeded_too() -> None:
    first = batches(pil_loaders(in_memory=False, kwargs={"jitter": True}).train)
    random.seed(77)
    assert same(first, batches(pil_loaders(in_memory=False, kwargs={"jitter": True}).train))


def test_prepared_images_are_shared_and_never_written_to() -> None:
    first, second = digits_loaders(augment=True), digits_loaders(augment=True, seed=9)
    prepared: Any = first.train.dataset
    assert prepared.images is second.train.dataset.images  # type: ignore[attr-defined]
    before = prepared.images.clone()
    for images, _ in first.train:
        images.zero_()
    assert torch.equal(prepared.images, before)
    other_size = digits_loaders(preprocessing=Preprocessing(24, 28, PLAIN.mean, PLAIN.std))
    assert other_size.example().shape == (2, 3, 24, 24)
    assert len(splits._PREPARED) <= splits._PREPARED_MAX


# Preprocessing


def test_grayscale_is_expanded_and_normalised() -> None:
    images, _ = next(iter(digits_loaders().test))
    raw = resize_and_crop(data.digits(False).images[:100], PLAIN)
    assert raw.shape[1] == 1
    assert images.shape == (100, 3, 32, 32)
    for channel in range(3):
        torch.testing.assert_close(images[:, channel], (raw[:, 0] / 255 - 0.3) / 0.2)


def test_normalise_uses_each_channels_own_values() -> None:
    preprocessing = Preprocessing(8, 8, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    expected = torchvision.transforms.functional.normalize(images / 255, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    torch.testing.assert_close(normalise(images, preprocessing), expected)


@pytest.mark.parametrize("target", ["bnre_exp.data.digits", f"{__name__}.PilRgb"])
def test_in_memory_and_item_by_item_agree(target: str) -> None:
    preprocessing = Preprocessing(24, 30, PLAIN.mean, PLAIN.std, "bicubic")
    stored = digits_loaders(target=target, preprocessing=preprocessing)
    read = digits_loaders(target=target, preprocessing=preprocessing, in_memory=False)
    grey_level = 1.01 / 255 / 0.2
    for (a, b), (c, d) in zip(stored.test, read.test, strict=True):
        assert (a - c).abs().max() <= grey_level
        assert torch.equal(b, d)
    assert stored.num_classes_seen == read.num_classes_seen
    assert stored.label_range == read.label_range


def test_resize_is_that_of_pil() -> None:
    image = data.digits(False).images[5]
    preprocessing = Preprocessing(32, 40, PLAIN.mean, PLAIN.std)
    pil = Image.fromarray(image[0].numpy()).resize((40, 40), Image.Resampling.BILINEAR).crop((4, 4, 36, 36))
    ours = resize_and_crop(image.unsqueeze(0), preprocessing)[0, 0]
    assert (ours.int() - torch.from_numpy(np.array(pil)).int()).abs().max() <= 1


def test_augmentation_draws_for_each_image_and_is_reproducible() -> None:
    images = torch.arange(32 * 32).remainder(251).to(torch.uint8).view(1, 1, 32, 32).repeat(64, 3, 1, 1)
    first = random_crop_and_flip(images, torch.Generator().manual_seed(1))
    assert torch.equal(first, random_crop_and_flip(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, random_crop_and_flip(images, torch.Generator().manual_seed(2)))
    assert len({image.numpy().tobytes() for image in first}) > 40
    # Every result is a window of the padded image or of its mirror image, in all channels alike.
    padded = torch.nn.functional.pad(images[0], (4, 4, 4, 4))
    windows = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    allowed = {window.contiguous().numpy().tobytes(): False for window in windows}
    allowed |= {window.flip(-1).contiguous().numpy().tobytes(): True for window in windows}
    flipped = [allowed[image.numpy().tobytes()] for image in first]
    assert 16 < sum(flipped) < 48


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 13), (3, 32)])
def test_a_batch_is_augmented_as_image_by_image(channels: int, size: int) -> None:
    images = torch.randint(0, 256, (20, channels, size, size), dtype=torch.uint8)
    generator, pad = torch.Generator().manual_seed(3), max(1, round(4 * size / 32))
    offsets = torch.randint(0, 2 * pad + 1, (2, len(images), 1), generator=generator)
    flip = torch.rand((len(images), 1), generator=generator) < 0.5
    assert flip.any() and not flip.all()
    for number, found in enumerate(random_crop_and_flip(images, torch.Generator().manual_seed(3))):
        padded = torch.zeros(channels, size + 2 * pad, size + 2 * pad, dtype=torch.uint8)
        padded[:, pad : pad + size, pad : pad + size] = images[number]
        top, left = offsets[:, number, 0].tolist()
        crop = padded[:, top : top + size, left : left + size]
        assert torch.equal(found, crop.flip(-1) if flip[number] else crop)


def test_only_training_images_are_augmented() -> None:
    plain, augmented = digits_loaders(), digits_loaders(augment=True)
    assert not same(batches(plain.train), batches(augmented.train))
    assert same(batches(plain.calibration), batches(augmented.calibration))
    assert same(batches(plain.reestimation), batches(augmented.reestimation))
    assert same(batches(plain.test), batches(augmented.test))


def test_settings_win_over_weights_and_weights_over_defaults() -> None:
    weights = Preprocessing(224, 256, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), "bicubic")
    defaults: dict[str, Any] = {"default_image_size": 32, "default_mean": [0.1], "default_std": [0.9]}
    nothing: dict[str, Any] = {"image_size": None, "mean": None, "std": None}
    assert resolve_preprocessing(weights, **nothing, **defaults) == weights
    assert resolve_preprocessing(None, **nothing, **defaults) == Preprocessing(32, 32, (0.1,) * 3, (0.9,) * 3)
    chosen = resolve_preprocessing(weights, image_size=112, mean=[0.0], std=None, **defaults)
    assert chosen == Preprocessing(112, 128, (0.0, 0.0, 0.0), weights.std, "bicubic")
    assert chosen.describe()["resize_size"] == 128
    with pytest.raises(UserError, match=r"dataset\.mean=\[0\.1, 0\.2\].*3"):
        resolve_preprocessing(weights, image_size=None, mean=[0.1, 0.2], std=None, **defaults)


def test_what_is_no_image_is_refused() -> None:
    assert to_uint8(Image.new("RGBA", (4, 5))).shape == (3, 5, 4)
    assert to_uint8(Image.new("1", (4, 5))).shape == (1, 5, 4)
    with pytest.raises(UserError, match="float32"):
        to_uint8(torch.zeros(3, 4, 4))
    with pytest.raises(UserError, match="ndarray"):
        to_uint8(np.zeros((3, 4, 4)))


# Datasets


def test_digits_split_is_fixed_stratified_and_complete() -> None:
    from sklearn.datasets import load_digits

    train, test = data.digits(True), data.digits(False)
    everything = load_digits()
    assert len(train) + len(test) == len(everything.target)
    for label in range(10):
        share = (test.labels == label).sum() / (everything.target == label).sum()
        assert 0.19 < share <= 0.2
    pixels = torch.cat([train.images, test.images]).flatten(1)
    original = torch.from_numpy(everything.data * 255 / 16).round().to(torch.uint8)
    assert sorted(row.numpy().tobytes() for row in pixels) == sorted(row.numpy().tobytes() for row in original)


def test_digits_are_the_same_where_scikit_learn_keeps_its_file_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = data.digits(True)
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    found = data.digits(True)
    assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)


@pytest.mark.fashion_mnist
@pytest.mark.parametrize(("train", "stem", "count"), [(True, "train", 60000), (False, "t10k", 10000)])
def test_fashion_mnist_is_what_debian_installs(train: bool, stem: str, count: int) -> None:
    split = data.fashion_mnist(train)
    folder = Path(datasets.DEBIAN_FASHION_MNIST)
    with gzip.open(folder / f"{stem}-images-idx3-ubyte.gz") as file:
        assert struct.unpack(">4I", file.read(16)) == (0x803, count, 28, 28)
        pixels = file.read()
    with gzip.open(folder / f"{stem}-labels-idx1-ubyte.gz") as file:
        assert struct.unpack(">2I", file.read(8)) == (0x801, count)
        labels = file.read()
    assert split.images.shape == (count, 1, 28, 28)
    assert split.images.numpy().tobytes() == pixels
    assert split.labels.tolist() == list(labels)


def test_fashion_mnist_under_root_comes_first(no_data: Path) -> None:
    raw = no_data / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte").write_bytes(
        struct.pack(">4I", 0x803, 2, 28, 28) + bytes(range(256)) * 6 + bytes(32)
    )
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 2) + bytes([7, 1]))
    split = data.fashion_mnist(False, str(no_data))
    assert split.labels.tolist() == [7, 1]
    assert split.images[0, 0, 0, :3].tolist() == [0, 1, 2]
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"not an idx file")
    with pytest.raises(UserError, match="damaged"):
        data.fashion_mnist(False, str(no_data))


def test_missing_fashion_mnist_says_how_to_get_it(no_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"apt install dataset-fashion-mnist.*dataset\.root"):
        data.fashion_mnist(True, str(no_data))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_how_to_get_it(no_data: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}.*internet.*dataset\.root"):
        getattr(data, name)(True, str(no_data))


def write_folder(base: Path, classes: tuple[str, ...]) -> None:
    for number, name in enumerate(classes):
        (base / name).mkdir(parents=True)
        for index in range(3):
            color = (40 * number, 10 * index, 0)
            Image.new("RGB", (36, 48), color).save(base / name / f"{index}.png")


def test_image_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ("cat", "dog"))
    write_folder(tmp_path / "test", ("cat", "dog"))
    options: dict[str, Any] = {"target": "bnre_exp.data.image_folder", "root": str(tmp_path), "batch_size": 2}
    loaders = digits_loaders(in_memory=False, **options)
    assert torch.cat([label for _, label in loaders.test]).tolist() == [0, 0, 0, 1, 1, 1]
    assert loaders.example().shape == (2, 3, 32, 32)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("train", "test"):
        shutil.copytree(tmp_path / name, moved / name)
    assert digits_loaders(in_memory=False, **{**options, "root": str(moved)}).digests == loaders.digests
    Image.new("RGB", (36, 48), "red").save(tmp_path / "test" / "dog" / "1.png")
    assert digits_loaders(in_memory=False, **options).digests["test"] != loaders.digests["test"]


def test_image_folder_layout_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root is not set.*ROOT/train/CLASS"):
        data.image_folder(True)
    with pytest.raises(UserError, match="no folder train"):
        data.image_folder(True, str(tmp_path))
    write_folder(tmp_path / "train", ("cat", "dog"))
    with pytest.raises(UserError, match="no folder val or test"):
        data.image_folder(True, str(tmp_path))
    write_folder(tmp_path / "val", ("dog",))
    with pytest.raises(UserError, match="in one split only .cat."):
        data.image_folder(False, str(tmp_path))
    write_folder(tmp_path / "val", ("cat",))
    assert data.image_folder(False, str(tmp_path)).classes == ["cat", "dog"]
    with pytest.raises(UserError, match="2 class folders; ImageNet has 1000"):
        data.imagenet(False, str(tmp_path))


# Checks


def test_labels_outside_the_classes_are_refused() -> None:
    loaders = digits_loaders()
    assert loaders.num_classes_seen == 10
    check_labels(loaders, 10)
    with pytest.raises(UserError, match=r"dataset\.num_classes=7.*from 0 to 9.*num_classes=10"):
        check_labels(loaders, 7)
    for in_memory in (True, False):
        with pytest.raises(UserError, match="from -1 to 1.*Number them from 0"):
            check_labels(pil_loaders(kwargs={"first_class": -1}, in_memory=in_memory), 10)


def test_digest_follows_the_contents() -> None:
    first = digits_loaders()
    assert digits_loaders(seed=7).digests == first.digests
    assert set(first.digests) == {"train", "test"}
    smaller = Preprocessing(30, 30, PLAIN.mean, PLAIN.std)
    assert digits_loaders(preprocessing=smaller).digests["test"] != first.digests["test"]


@pytest.mark.parametrize(
    ("target", "kwargs", "message"),
    [
        ("nowhere.Data", {}, "no module nowhere"),
        ("bnre_exp.data.digit", {}, "digit"),
        ("bnre_exp.data.digits", {"colour": 1}, r"dataset\.kwargs=.*colour"),
        ("bnre_exp.data.digits", {"train": True}, r"dataset\.kwargs holds train"),
        (f"{__name__}.same", {}, r"dataset\.kwargs"),
        (f"{__name__}.no_images", {}, r"no training images"),
        (f"{__name__}.a_number", {}, r"returned a int"),
        (f"{__name__}.triples", {}, r"expected a pair"),
    ],
)
def test_wrong_datasets_are_refused(target: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        digits_loaders(target=target, kwargs=kwargs)


def no_images(train: bool, root: str | None) -> ImageTensors:
    return ImageTensors(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0))


def a_number(train: bool, root: str | None) -> int:
    return 5


def triples(train: bool, root: str | None) -> list[tuple[int, int, int]]:
    return [(1, 2, 3)] * 10


def test_raw_images_of_a_wrong_kind_are_refused() -> None:
    with pytest.raises(UserError, match=re.escape("torch.float32")):
        ImageTensors(torch.zeros(2, 3, 8, 8), torch.zeros(2))
