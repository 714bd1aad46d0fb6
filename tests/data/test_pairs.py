"""Images that come with masks or other images, in folders and as torchvision has them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from bnre_exp.data import DataSpec, Loaders, Preprocessing, build_loaders, image_masks, image_pairs, oxford_pet, voc
from bnre_exp.errors import UserError


def save(path: Path, pixels: Any, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


def write_pairs(root: Path, first: str, second: str, make: Callable[[Any, int], Any]) -> Path:
    """Two splits of six pictures each; ``make`` draws the second of a pair."""
    for split, count in (("train", 6), ("val", 4)):
        for index in range(count):
            pixels = np.random.RandomState(index + (100 if split == "val" else 0)).randint(0, 256, (18, 20 + index, 3))
            save(root / split / first / f"{index}.bmp", pixels)
            save(root / split / second / f"{index}.png", make(pixels, index))
    return root


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    return write_pairs(tmp_path, "images", "masks", lambda pixels, index: pixels[..., 0] // 100)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path, "input", "target", lambda pixels, index: 255 - pixels)


def loaders_of(name: str, root: Path, targets: str, **changes: Any) -> Loaders:
    how = Preprocessing(16, 16, (0.0,) * 3, (1.0,) * 3, fit="cut" if targets == "image" else "pad")
    options: dict[str, Any] = {"batch_size": 3, "eval_batch_size": 4, "val_fraction": 0.0, **changes}
    return build_loaders(
        DataSpec(f"bnre_exp.data.{name}", root=str(root), targets=targets, **options), preprocessing=how
    )


def test_masks_keep_the_numbers_of_their_files(masks: Path) -> None:
    palette = Image.fromarray(np.full((18, 20), 2, np.uint8))
    palette.putpalette([9, 9, 9] * 3)
    palette.save(masks / "train" / "masks" / "0.png")
    Image.fromarray(np.eye(18, 21, dtype=np.uint8) * 255).convert("1").save(masks / "train" / "masks" / "1.png")
    turned = Image.fromarray(np.tile(np.arange(18, dtype=np.uint8), (22, 1)))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(masks / "train" / "masks" / "2.png", exif=exif)
    found = image_masks(True, str(masks), ["a", "b", "c"])
    assert len(found) == 6 and found.classes == ["a", "b", "c"] and len(found.files_of(range(6))) == 12
    assert torch.equal(found[0][1], torch.full((18, 20), 2, dtype=torch.uint8))
    assert torch.equal(found[1][1], torch.eye(18, 21, dtype=torch.uint8))
    assert torch.equal(found[2][1], torch.arange(18, dtype=torch.uint8)[:, None].expand(18, 22))
    image, mask = found[5]
    assert torch.equal(mask, torch.from_numpy(np.asarray(image)[..., 0] // 100))


@pytest.mark.parametrize("in_memory", [True, False])
def test_loaders_of_masks_and_of_pairs(tmp_path: Path, in_memory: bool) -> None:
    first = write_pairs(tmp_path / "a", "images", "masks", lambda pixels, index: pixels[..., 0] // 100)
    loaders = loaders_of("image_masks", first, "mask", in_memory=in_memory, num_classes=3, augment=True)
    images, mask = next(iter(loaders.test))
    assert images.shape == (4, 3, 16, 16) and mask.shape == (4, 16, 16) and mask.dtype == torch.int64
    assert set(mask.unique().tolist()) == {0, 1, 2, 255} and loaders.label_range["train"] == (0, 2)
    second = write_pairs(tmp_path / "b", "input", "target", lambda pixels, index: 255 - pixels)
    for images, target in loaders_of("image_pairs", second, "image", in_memory=in_memory, augment=True).train:
        assert images.shape == target.shape == (3, 3, 16, 16)
        torch.testing.assert_close(images + target, torch.ones_like(images))


@pytest.mark.parametrize("in_memory", [True, False])
def test_digests_tell_a_change_of_one_mask(masks: Path, in_memory: bool) -> None:
    first = loaders_of("image_masks", masks, "mask", in_memory=in_memory)
    path = masks / "train" / "masks" / "3.png"
    changed = np.array(Image.open(path))
    changed[9, 9] = (changed[9, 9] + 1) % 3
    save(path, changed)
    second = loaders_of("image_masks", masks, "mask", in_memory=in_memory)
    assert first.digests["train"] != second.digests["train"] and first.digests["test"] == second.digests["test"]
    assert first.identity != second.identity
    assert second.digests == loaders_of("image_masks", masks, "mask", in_memory=in_memory).digests


def test_every_mask_is_checked_before_training(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            (tmp_path / split / folder).mkdir(parents=True)
            for index in range(140):
                save(tmp_path / split / folder / f"{index:03}.png", np.full((4, 4), index % 3, np.uint8))
    loaders_of("image_masks", tmp_path, "mask", in_memory=False, num_classes=3)
    save(tmp_path / "train" / "masks" / "077.png", np.full((4, 4), 3, np.uint8))
    save(tmp_path / "train" / "masks" / "079.png", np.full((4, 5), 2, np.uint8))
    said = r"2 of 140 targets are wrong: item 77 .*classes go from 3 to 3; .*; item 79 .*its mask is \[4, 5\]"
    with pytest.raises(UserError, match=said):
        loaders_of("image_masks", tmp_path, "mask", in_memory=False, num_classes=3)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def text(path: Path) -> None:
    path.write_bytes(b"this is no picture")


def rgb(path: Path) -> None:
    save(path, np.zeros((18, 23, 3)))


def other_size(path: Path) -> None:
    save(path, np.zeros((18, 24)))


def other_class(path: Path) -> None:
    save(path, np.full((18, 23), 7))


MASK = "train/masks/3.png"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (MASK, remove, r"in train, 1 pictures are in one of images and masks only: 3\. Expected ROOT/train/images"),
        ("val/images/2.bmp", remove, r"in val, 1 pictures are in one of images and masks only: 2"),
        (MASK, empty, r"3\.png.*(cannot be read|empty)"),
        (MASK, truncate, r"train/masks/3\.png"),
        (MASK, text, r"train/masks/3\.png"),
        ("train/images/3.bmp", text, r"train/images/3\.bmp"),
        ("train/images/3.bmp", empty, r"train/images/3\.bmp"),
        (MASK, rgb, r"item 3 .*the mask .*masks/3\.png is a picture of mode RGB; expected one class a pixel"),
        (MASK, other_size, r"item 3 .*its mask is \[18, 24\]; expected \[18, 23\], as the image"),
        (MASK, other_class, r"item 3 .*its classes go from 7 to 7; expected 0 to 2"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_files_that_cannot_be_used_are_named(
    masks: Path, name: str, spoil: Callable[[Path], None], message: str, in_memory: bool
) -> None:
    spoil(masks / name)
    with pytest.raises(UserError, match=message) as caught:
        for _ in loaders_of("image_masks", masks, "mask", num_classes=3, in_memory=in_memory).train:
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no root", r"dataset\.root"),
        ("no folder", r"there is no folder .*train/masks\. Expected ROOT/train/images"),
        ("no pictures", r"train/masks has no pictures"),
        ("twice", r"train/images has two pictures of one name"),
    ],
)
def test_folders_of_another_layout_are_told(masks: Path, change: str, message: str) -> None:
    if change == "no folder":
        (masks / "train" / "masks").rename(masks / "train" / "labels")
    elif change == "no pictures":
        for path in (masks / "train" / "masks").iterdir():
            path.rename(path.with_suffix(".npy"))
    elif change == "twice":
        save(masks / "train" / "images" / "0.png", np.zeros((18, 20, 3)))
    with pytest.raises(UserError, match=message):
        image_masks(True, None if change == "no root" else str(masks))


def test_pairs_are_found_by_name_in_val_or_test(pairs: Path) -> None:
    (pairs / "val").rename(pairs / "test")
    found = image_pairs(False, str(pairs))
    assert [(path.name, target.name) for path, target in zip(found.images, found.target_files)] == [
        (f"{i}.bmp", f"{i}.png") for i in range(4)
    ]
    image, target = found[3]
    assert np.array_equal(255 - np.asarray(image), np.asarray(target))


def test_targets_of_gray_and_colour_do_not_go_into_one_batch(pairs: Path) -> None:
    save(pairs / "val" / "target" / "1.png", np.zeros((18, 21)))
    message = re.escape("the target images of a batch are [3, 16, 16] and [1, 16, 16]; expected one shape for all")
    with pytest.raises(UserError, match=message):
        next(iter(loaders_of("image_pairs", pairs, "image").test))


# torchvision's own


VOC_XML = """<annotation><folder>VOC2012</folder><filename>{name}.jpg</filename><size><width>40</width>
<height>30</height><depth>3</depth></size>{objects}</annotation>"""
VOC_OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>
<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"""


def write_voc(root: Path) -> Path:
    base = root / "VOCdevkit" / "VOC2012"
    found = {
        "a": [("cat", 0, 1, 1, 40, 30), ("dog", 1, 3, 5, 9, 12)],
        "b": [("tvmonitor", 0, 11, 6, 20, 25)],
        "c": [],
    }
    for name, objects in found.items():
        save(base / "JPEGImages" / f"{name}.jpg", np.full((30, 40, 3), 99))
        save(base / "SegmentationClass" / f"{name}.png", np.full((30, 40), 20))
        rows = [VOC_OBJECT.format(**dict(zip(("name", "difficult", "x1", "y1", "x2", "y2"), one))) for one in objects]
        (base / "Annotations").mkdir(exist_ok=True)
        (base / "Annotations" / f"{name}.xml").write_text(VOC_XML.format(name=name, objects="".join(rows)))
    for kind in ("Main", "Segmentation"):
        (base / "ImageSets" / kind).mkdir(parents=True)
        for split, names in (("train", "a\nb\n"), ("val", "c\nb\n")):
            (base / "ImageSets" / kind / f"{split}.txt").write_text(names)
    return root


def test_voc_that_is_there_is_not_downloaded(tmp_path: Path) -> None:
    root = str(write_voc(tmp_path))
    boxes = voc(True, root, year=2012)
    image, target = boxes[0]
    assert image.size == (40, 30) and target["boxes"].tolist() == [[0, 0, 40, 30]]
    everything: Any = voc(True, root, difficult=True)
    assert everything[0][1]["boxes"].tolist() == [[0, 0, 40, 30], [2, 4, 9, 12]]
    assert [everything.classes[label] for label in everything[0][1]["labels"]] == ["cat", "dog"]
    none = voc(False, root)[0][1]
    assert none["boxes"].shape == (0, 4) and none["labels"].tolist() == []
    masks: Any = voc(False, root, targets="mask")
    assert len(masks.classes) == 21 and masks.classes[20] == "tvmonitor"
    assert torch.equal(masks[1][1], torch.full((30, 40), 20, dtype=torch.uint8))
    assert str(masks.samples[0][0]).endswith("c.jpg")


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("targets", ["objects", "mask"])
def test_loaders_of_voc(tmp_path: Path, targets: str, in_memory: bool) -> None:
    root = write_voc(tmp_path)
    loaders = loaders_of("voc", root, targets, in_memory=in_memory)
    images, found = next(iter(loaders.test))
    assert images.shape == (2, 3, 16, 16) and len(found) == 2
    file = root / "VOCdevkit" / "VOC2012" / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<ymax>30", "<ymax>29"))
    changed = loaders_of("voc", root, targets, in_memory=in_memory)
    assert (changed.digests["train"] == loaders.digests["train"]) == (targets == "mask")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "class"}, "has boxes and masks, for detection and segmentation; the task takes 'class'"),
        ({"year": "2013"}, r"year=2013; expected one of 2007, .*2012"),
    ],
)
def test_what_voc_does_not_have_is_told(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        voc(True, str(tmp_path), **options)


def write_pets(root: Path) -> Path:
    base = root / "oxford-iiit-pet"
    trimap = np.ones((20, 24), np.uint8)
    trimap[:, 8:16], trimap[:, 16:] = 2, 3
    for index in range(6):
        save(base / "images" / f"pet_{index}.jpg", np.full((20, 24, 3), 40 * index))
        save(base / "annotations" / "trimaps" / f"pet_{index}.png", trimap)
    lines = [f"pet_{index} {index % 37 + 1} 1 1\n" for index in range(6)]
    (base / "annotations" / "trainval.txt").write_text("".join(lines[:4]))
    (base / "annotations" / "test.txt").write_text("".join(lines[4:]))
    return root


def test_oxford_pets_have_masks_and_breeds(tmp_path: Path) -> None:
    root = str(write_pets(tmp_path))
    masks = oxford_pet(True, root)
    assert masks.classes == ["pet", "background", "border"] and len(masks) == 4
    assert masks[0][1][0].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    breeds = oxford_pet(False, root, targets="class")
    reference = torchvision.datasets.OxfordIIITPet(root, split="test")
    assert [label for _, label in breeds] == [label for _, label in reference] == breeds.targets == [4, 5]
    with pytest.raises(UserError, match="has masks and classes; the task takes 'objects'"):
        oxford_pet(True, root, targets="objects")
    loaders = loaders_of("oxford_pet", Path(root), "mask", num_classes=3)
    assert loaders.label_range == {"train": (0, 2), "test": (0, 2)}


def test_what_is_not_there_and_cannot_be_downloaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = "http://127.0.0.1:9/data.tar"
    monkeypatch.setitem(torchvision.datasets.voc.DATASET_YEAR_DICT["2012"], "url", unreachable)
    resources = [(unreachable, md5) for _, md5 in torchvision.datasets.OxfordIIITPet._RESOURCES]
    monkeypatch.setattr(torchvision.datasets.OxfordIIITPet, "_RESOURCES", resources)
    said = r"not found in .*, and the download failed .*set dataset\.root to a folder"
    for build in (voc, oxford_pet):
        with pytest.raises(UserError, match=said) as caught:
            build(True, os.fspath(tmp_path / "nothing"))
        assert "You can use download=True" not in str(caught.value)  # it was tried
