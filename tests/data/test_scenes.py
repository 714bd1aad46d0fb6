"""Scenes of digits: what they come with is where their ink is, and they are always the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, masks_to_boxes

from bnre_exp.data import DataSpec, Preprocessing, build_loaders, digit_scenes, digits
from bnre_exp.data.scenes import INK, TARGETS
from bnre_exp.errors import UserError


def entries(item: Any) -> list[Tensor]:
    image, target = item
    return [image, *(target.values() if isinstance(target, dict) else [target])]


@pytest.mark.parametrize("size", [16, 64, 97])
def test_boxes_are_tight_around_masks_that_do_not_overlap(size: int) -> None:
    scenes = digit_scenes(True, size=size, most=6, count=40)
    counts = set()
    for image, target in (scenes[index] for index in range(40)):
        masks, boxes, labels = target["masks"], target["boxes"], target["labels"]
        assert image.shape == (1, size, size) and image.dtype == torch.uint8
        assert masks.dtype == torch.bool and len(masks) == len(boxes) == len(labels)
        assert torch.equal(boxes, masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0]))
        assert int(masks.sum(0).max()) == 1
        between = box_iou(boxes, boxes).fill_diagonal_(0)
        assert float(between.max()) == 0
        assert ((labels >= 0) & (labels < 10)).all() and labels.dtype == torch.int64
        counts.add(len(boxes))
    assert counts >= {1, 2, 3} and max(counts) <= 6


def test_masks_are_what_is_bright() -> None:
    """Of one digit alone: without noise its ink stands out from the canvas, whatever is behind it."""
    for image, target in digit_scenes(True, most=1, noise=0.0, count=20):
        (mask,) = target["masks"]
        inside, outside = image[0][mask].double(), image[0][~mask].double()
        assert inside.mean() > outside.mean() + 25
        x1, y1, x2, y2 = (int(side) for side in target["boxes"][0])
        found = torch.zeros_like(mask)
        found[y1:y2, x1:x2] = True
        assert mask.any() and (found | ~mask).all()


@pytest.mark.parametrize("targets", TARGETS)
def test_every_scene_is_always_the_same(targets: str) -> None:
    first, again = digit_scenes(True, targets=targets), digit_scenes(True, targets=targets)
    torch.rand(5)
    for index in (7, 0, 1199):
        assert all(map(torch.equal, entries(first[index]), entries(again[index])))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], digit_scenes(False, targets=targets)[0][0])
    assert all(map(torch.equal, entries(first[-1]), entries(first[1199])))


def test_targets_of_one_number_show_the_same_scene() -> None:
    scenes = {targets: digit_scenes(True, targets=targets, most=3) for targets in ("objects", "mask", "image")}
    noiseless = digit_scenes(True, targets="image", most=3, noise=0.0)
    for index in range(8):
        items = {targets: scenes[targets][index] for targets in scenes}
        objects, mask, clean = (items[targets][1] for targets in ("objects", "mask", "image"))
        assert torch.equal(items["objects"][0], items["mask"][0]) and torch.equal(items["mask"][0], items["image"][0])
        expected = torch.zeros(64, 64, dtype=torch.uint8)
        for label, ink in zip(objects["labels"], objects["masks"]):
            expected[ink] = 1 + int(label)
        assert mask.dtype == torch.uint8 and torch.equal(mask, expected)
        assert torch.equal(clean, noiseless[index][0])


def test_keypoints_are_the_ends_of_the_one_digits_ink() -> None:
    scenes = digit_scenes(True, targets="keypoints", noise=0.0)
    for index in range(30):
        image, points = scenes[index]
        assert points.shape == (4, 2)
        (top, bottom, left, right) = points
        assert top[1] == points[:, 1].min() and bottom[1] == points[:, 1].max()
        assert left[0] == points[:, 0].min() and right[0] == points[:, 0].max()
        width, height = right[0] - left[0] + 1, bottom[1] - top[1] + 1
        assert 64 // 8 < float(height) <= 28 and 2 <= float(width) <= 28
        x, y = points.floor().long().unbind(1)
        assert (image[0, y, x].double() / 255 > INK * 0.6).all()


def pooled(train: bool) -> set[bytes]:
    return {image.numpy().tobytes() for image in digits(train).images}


def test_digits_of_test_scenes_are_in_no_training_scene() -> None:
    train, test = digit_scenes(True), digit_scenes(False)
    used = [{image.numpy().tobytes() for image in scenes.images} for scenes in (train, test)]
    assert not used[0] & used[1] and used == [pooled(True), pooled(False)]
    counts = [[len(scenes[index][1]["boxes"]) for index in range(30)] for scenes in (train, test)]
    assert counts[0] != counts[1]  # nor are their places those of training scenes


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_noise_has_its_standard_deviation(noise: float) -> None:
    noisy, clean = digit_scenes(True, targets="image", noise=noise)[3]
    between = (clean > 100) & (clean < 155)  # where little is clipped
    between = between if int(between.sum()) > 200 else (clean > 60) & (clean < 195)
    spread = float(((noisy.double() - clean.double())[between] / 255).std())
    assert spread == pytest.approx(noise, rel=0.15, abs=1e-9)


def test_counts_and_sizes_are_those_asked_for() -> None:
    assert len(digit_scenes(True)) == 1200 and len(digit_scenes(False)) == 300
    small = digit_scenes(False, size=20, count=7, most=1)
    assert len(small) == 7 and len(list(small)) == 7 and small[6][0].shape == (1, 20, 20)
    assert all(len(target["boxes"]) == 1 for _, target in small)
    with pytest.raises(IndexError):
        small[7]


def test_classes_are_named_where_there_are_any() -> None:
    names = [str(number) for number in range(10)]
    assert digit_scenes(True).classes == names
    assert digit_scenes(True, targets="mask").classes == ["background", *names]
    assert digit_scenes(True, targets="image").classes == digit_scenes(True, targets="keypoints").classes == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "class"}, r"no targets of the kind 'class'.*For classification take dataset=digits"),
        ({"of": "letters"}, r"of='letters'; expected one of digits, fashion_mnist"),
        ({"size": 15}, "expected size >= 16, most >= 1, noise >= 0 and count >= 1"),
        ({"most": 0}, "expected size >= 16"),
        ({"noise": -0.1}, "expected size >= 16"),
        ({"noise": float("nan")}, "expected size >= 16"),
        ({"count": 0}, "expected size >= 16"),
    ],
)
def test_what_cannot_be_drawn_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        digit_scenes(True, **changes)


@pytest.mark.fashion_mnist
def test_scenes_of_fashion_mnist() -> None:
    scenes = digit_scenes(False, of="fashion_mnist", count=3)
    image, target = scenes[2]
    assert image.shape == (1, 64, 64) and scenes.images.shape[1:] == (1, 28, 28)
    assert torch.equal(target["boxes"], masks_to_boxes(target["masks"]) + torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("targets", TARGETS)
def test_loaders_ask_for_the_targets_that_the_task_takes(targets: str, in_memory: bool) -> None:
    options: dict[str, Any] = {"kwargs": {"count": 12, "size": 32}, "batch_size": 4, "in_memory": in_memory}
    how = Preprocessing(32, 32, (0.2,), (0.2,), channels=1, fit="cut" if targets == "image" else "pad")
    loaders = build_loaders(DataSpec("bnre_exp.data.digit_scenes", targets=targets, **options), preprocessing=how)
    images, target = next(iter(loaders.test))
    assert images.shape == (12, 1, 32, 32)
    shown = digit_scenes(False, targets=targets, count=12, size=32)
    raw = torch.stack([shown[index][0] for index in range(12)])
    torch.testing.assert_close(images, (raw / 255 - 0.2) / 0.2)
    if targets == "objects":
        assert all(torch.equal(one["boxes"], shown[index][1]["boxes"]) for index, one in enumerate(target))
        return
    shapes = {"mask": (12, 32, 32), "image": (12, 1, 32, 32), "keypoints": (12, 4, 3)}
    assert target.shape == shapes[targets]
    known = torch.stack([shown[index][1] for index in range(12)])
    expected = {"mask": known, "image": known / 255, "keypoints": torch.nn.functional.pad(known, (0, 1), value=1.0)}
    torch.testing.assert_close(target, expected[targets].to(target.dtype))
