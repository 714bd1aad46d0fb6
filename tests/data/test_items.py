"""Files and items that cannot be used: one plain message that names them, whichever process meets them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from bnre_exp.data import DataSpec, ImageTensors, Loaders, Preprocessing, build_loaders, reading
from bnre_exp.data.items import read_item
from bnre_exp.data.listed import listed_classes, listed_files, listed_labels
from bnre_exp.errors import UserError

SMALL = Preprocessing(8, 8, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2))
FOLDER = "bnre_exp.data.image_folder"


def loaders_of(target: str, **changes: Any) -> Loaders:
    options: dict[str, Any] = {"batch_size": 4, "eval_batch_size": 4, "val_fraction": 0.0, **changes}
    return build_loaders(DataSpec(target, **options), preprocessing=SMALL)


def read_all(loaders: Loaders) -> None:
    for loader in (loaders.train, loaders.test):
        for _ in loader:
            pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two splits of two classes with three images each."""
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (8, 9), (90 * number, 20 * index, 7)).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def bomb(path: Path) -> None:
    """A PNG of 20000 x 20000 pixels, as far as its header says."""
    chunks = [(b"IHDR", struct.pack(">2I5B", 20000, 20000, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(100)))]
    parts = [
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in [*chunks, (b"IEND", b"")]
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (bomb, "decompression bomb"),
    (truncate, ""),
    (broken_link, "symbolic link to nothing"),
    (pipe, "no regular file"),
    (lambda path: path.write_bytes(b""), "empty"),
    (lambda path: path.write_bytes(b"no image"), "cannot identify"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=["bomb", "truncated", "link", "pipe", "empty", "text"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_damaged_file_is_named_before_anything_is_trained(
    folder: Path, damage: Callable[[Path], Any], reason: str, in_memory: bool
) -> None:
    damage(folder / "val" / "dog" / "1.png")
    with pytest.raises(UserError, match=rf"val/dog/1\.png.*{reason}.*[Rr]emove"):
        loaders_of(FOLDER, root=str(folder), in_memory=in_memory)


def test_all_damaged_files_are_counted(folder: Path) -> None:
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"6 of 6 image files cannot be read"):
        loaders_of(FOLDER, root=str(folder), in_memory=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_damaged_inside_is_named_when_it_is_read(folder: Path, workers: int) -> None:
    for path in (folder / "val").rglob("*.png"):
        noise = np.random.RandomState(0).randint(0, 255, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(noise).save(path.with_suffix(".jpg"))
        path.unlink()
    truncated = folder / "val" / "dog" / "1.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-900])
    loaders = loaders_of(FOLDER, root=str(folder), in_memory=False, workers=workers)
    with pytest.raises(UserError) as caught:
        read_all(loaders)
    assert f"image 4 ({truncated}) cannot be read: " in str(caught.value)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


def test_16_bits_and_exif_in_a_folder(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = np.full((8, 8), 32768, dtype=np.uint16)
    picture[:, :4] = 0
    Image.fromarray(picture).save(folder / "val" / "cat" / "0.png", exif=exif)
    for in_memory in (True, False):
        images, _ = next(iter(loaders_of(FOLDER, root=str(folder), in_memory=in_memory).test))
        pixels = images[0] * 0.2 + 0.3
        torch.testing.assert_close(pixels[:, :4], torch.zeros(3, 4, 8))
        torch.testing.assert_close(pixels[:, 4:], torch.full((3, 4, 8), 128 / 255))


# A user's own dataset


class Users(Dataset[Any]):
    """Items that the test chooses: sound ones, and at position 5 another."""

    def __init__(self, train: bool, root: str | None, odd: str = "") -> None:
        if odd == "constructor":
            raise KeyError("a typo")
        self.odd = odd

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        image = torch.full((3, 9, 9), index, dtype=torch.uint8)
        if index != 5 or not self.odd:
            return image, index % 2
        odd: dict[str, Any] = {
            "half": (image, 0.5), "text": (image, "1"), "true": (image, True), "nan": (image, float("nan")),
            "whole float": (image, 1.0), "none": (image, None), "several": (image, torch.tensor([0, 1])),
            "out of range": (image, 7), "nan image": (torch.full((3, 9, 9), torch.nan), 1), "one": image,
            "five channels": (torch.zeros(5, 9, 9, dtype=torch.uint8), 1), "array": (np.zeros((9, 9, 3)), 1),
            "bool tensor": (image, torch.tensor(True)),
        }  # fmt: skip
        return odd[self.odd]  # KeyError for any other


WRONG = {
    "half": r"class of item 5 is 0\.5; expected an integer",
    "text": r"class of item 5 is '1'; expected an integer",
    "true": r"class of item 5 is True; expected an integer",
    "bool tensor": r"class of item 5 is tensor\(True\); expected an integer",
    "nan": r"class of item 5 is nan; expected an integer",
    "whole float": r"class of item 5 is 1\.0; expected an integer",
    "none": r"class of item 5 is None; expected an integer",
    "several": r"class of item 5 is tensor\(\[0, 1\]\); expected an integer",
    "nan image": r"item 5: an image is a torch\.float32 tensor",
    "five channels": r"item 5: an image is a torch\.uint8 tensor of shape \[5, 9, 9\]",
    "array": r"item 5: an image is a ndarray",
    "one": r"item 5 is a Tensor; expected a pair",
    "raises": r"reading item 5 of Users raised KeyError: 'raises' \(.*test_items\.py, line \d+\)",
    "constructor": r"dataset\._target_=.*Users raised KeyError: 'a typo' \(.*test_items\.py, line \d+\)",
}


@pytest.mark.parametrize("odd", WRONG)
@pytest.mark.parametrize("in_memory", [True, False])
def test_items_of_another_kind_are_named(odd: str, in_memory: bool) -> None:
    with pytest.raises(UserError, match=WRONG[odd]):
        loaders_of(f"{__name__}.Users", kwargs={"odd": odd}, in_memory=in_memory)


@pytest.mark.parametrize("label", [1, np.int16(1), np.uint8(1), torch.tensor(1), torch.tensor([1]), np.array(1)])
def test_every_kind_of_integer_is_a_class(label: Any) -> None:
    _, found = read_item([(torch.zeros(3, 4, 4, dtype=torch.uint8), label)], 0)
    assert found == 1 and type(found) is int


class Listed(Users):
    """As above; its classes are listed, so that items are read only when they are needed."""

    def __init__(self, train: bool, root: str | None, odd: str = "", folder: str = "") -> None:
        super().__init__(train, root, odd)
        self.targets = [index % 2 for index in range(8)]
        path = str(Path(folder, "a.bin"))
        self.samples = [(path, target) for target in self.targets]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("odd", "message"),
    [("out of range", r"class of item 5 .*is 7; expected 0 to 1 .*num_classes=2"), ("raises", "KeyError")],
)
def test_what_is_found_while_it_is_read_is_told_plainly(tmp_path: Path, workers: int, odd: str, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"a")
    options: dict[str, Any] = {"kwargs": {"odd": odd, "folder": str(tmp_path)}, "in_memory": False, "num_classes": 2}
    loaders = loaders_of(f"{__name__}.Listed", workers=workers, **options)
    with pytest.raises(UserError, match=message) as caught:
        read_all(loaders)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_worker_that_dies_is_told_plainly() -> None:
    loaders = loaders_of(f"{__name__}.Dying", in_memory=False, workers=1)
    with pytest.raises(UserError, match=r"process died \(DataLoader worker .*runtime\.workers=0"):
        read_all(loaders)


class Dying(Users):
    """As above; a worker process that reads its item 5 dies, as for want of memory."""

    def __getitem__(self, index: int) -> Any:
        if torch.utils.data.get_worker_info() is not None and index == 5:
            os._exit(9)
        return super().__getitem__(index)


def unsized(train: bool, root: str | None) -> Any:
    class Unsized:
        def __len__(self) -> int:
            raise RuntimeError("how many?")

        def __getitem__(self, index: int) -> Any:
            return None

    return Unsized()


def floats(train: bool, root: str | None) -> ImageTensors:
    return ImageTensors(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0.0, 0.5, 1.0, 1.0]))


def four_channels(train: bool, root: str | None) -> ImageTensors:
    return ImageTensors(torch.zeros(4, 4, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unsized", r"its length raised RuntimeError: how many\?"),
        ("floats", r"labels are torch\.float32; expected integers"),
        ("four_channels", r"C = 1 or 3"),
    ],
)
def test_datasets_of_another_kind_are_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loaders_of(f"{__name__}.{name}")


# Files that change while the process runs


def first_pixels(loaders: Loaders) -> Tensor:
    return next(iter(loaders.test))[0][0]


@pytest.mark.parametrize("in_memory", [True, False])
def test_changed_files_are_seen_by_the_next_job_of_a_process(folder: Path, tmp_path: Path, in_memory: bool) -> None:
    path = (folder / "val" / "cat" / "0.png").rename(folder / "val" / "cat" / "0.bmp")
    digests = tmp_path / "digests"
    digests.mkdir()
    Image.new("RGB", (8, 9), (255, 0, 0)).save(path)
    before = path.stat()

    def build() -> Loaders:
        spec = DataSpec(FOLDER, root=str(folder), batch_size=4, val_fraction=0.0, in_memory=in_memory)
        return build_loaders(spec, preprocessing=SMALL, digests_folder=digests)

    first = build()
    old = first_pixels(first)
    Image.new("RGB", (8, 9), (0, 255, 0)).save(path)  # as long as before, and as old, as far as one can set that
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = build()
    assert second.digests["test"] != first.digests["test"]
    assert second.digests["train"] == first.digests["train"]
    assert not torch.equal(first_pixels(second), old)


def test_settled_files_are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_CLOCK_TICK", -(10**12))  # everything counts as settled
    digests = tmp_path / "digests"
    digests.mkdir()
    for in_memory in (True, False):
        spec = DataSpec(FOLDER, root=str(folder), batch_size=4, val_fraction=0.0, in_memory=in_memory)
        first = build_loaders(spec, preprocessing=SMALL, digests_folder=digests)
        with monkeypatch.context() as patched:
            patched.setattr(reading, "read_item", None)
            patched.setattr(reading, "file_sha256", None)
            again = build_loaders(spec, preprocessing=SMALL, digests_folder=digests)
        assert again.digests == first.digests
    Image.new("RGB", (8, 9), (1, 2, 3)).save(folder / "val" / "cat" / "0.png")
    changed = build_loaders(spec, preprocessing=SMALL, digests_folder=digests)
    assert changed.digests["test"] != first.digests["test"]


def from_a_file(train: bool, root: str | None) -> ImageTensors:
    value = int(Path(root or "", "value").read_text())
    images = torch.full((6, 1, 8, 8), value, dtype=torch.uint8)
    return ImageTensors(images, torch.arange(6) % 2)


def test_what_a_users_callable_reads_may_change_too(tmp_path: Path) -> None:
    (tmp_path / "value").write_text("5")
    first = loaders_of(f"{__name__}.from_a_file", root=str(tmp_path))
    (tmp_path / "value").write_text("9")
    second = loaders_of(f"{__name__}.from_a_file", root=str(tmp_path))
    assert first.digests["test"] != second.digests["test"]
    assert not torch.equal(first_pixels(first), first_pixels(second))
    dataset: Any = second.train.dataset
    again: Any = loaders_of(f"{__name__}.from_a_file", root=str(tmp_path)).train.dataset
    assert again.images is dataset.images  # the same contents are prepared once


def test_torchvisions_own_folder_is_read_by_depth_too(folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(folder / "val" / "cat" / "0.png")
    loaders = loaders_of(f"{__name__}.plain_folder", root=str(folder))
    torch.testing.assert_close(first_pixels(loaders) * 0.2 + 0.3, torch.full((3, 8, 8), 128 / 255))


def test_a_subset_shows_what_the_whole_does(folder: Path) -> None:
    torchvision_subset = subset(True, str(folder))
    assert listed_classes(torchvision_subset) == ["cat", "dog"]
    labels, files = listed_labels(torchvision_subset), listed_files(torchvision_subset)
    assert labels is not None and labels.tolist() == [1, 1, 0, 0]
    assert files is not None and files[0] == folder / "train" / "dog" / "2.png"
    files[0].write_bytes(b"no image")
    with pytest.raises(UserError, match=r"image 0 \(.*dog/2\.png\) cannot be read"):
        read_item(torchvision_subset, 0)
    with pytest.raises(UserError, match=r"1 of 4 image files.*dog/2\.png"):
        loaders_of(f"{__name__}.subset", root=str(folder), in_memory=False)


def subset(train: bool, root: str | None) -> Subset[Any]:
    return Subset(plain_folder(train, root), [5, 4, 0, 1])


def plain_folder(train: bool, root: str | None) -> torchvision.datasets.ImageFolder:
    return torchvision.datasets.ImageFolder(str(Path(root or "", "train" if train else "val")))
