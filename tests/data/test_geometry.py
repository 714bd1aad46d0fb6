"""Where targets are after their images were resized, padded, cut, shifted and flipped: looked up in the images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bnre_exp.data import Preprocessing
from bnre_exp.data.geometry import GREY, finished, fitted
from bnre_exp.data.samples import IGNORED, KINDS, read_sample
from bnre_exp.data.scenes import digit_scenes
from bnre_exp.errors import UserError

RED, GREEN, BACK = (255, 0, 0), (0, 255, 0), (0, 0, 255)
SIZE = 32


def how(fit: str, size: int = SIZE, resize: int | None = None) -> Preprocessing:
    return Preprocessing(size, resize or size, (0.0,) * 3, (1.0,) * 3, fit=fit)


def scene(height: int, width: int, red: tuple[int, ...], green: tuple[int, ...]) -> Tensor:
    """Two filled boxes (x1, y1, x2, y2) on blue."""
    image = torch.tensor(BACK, dtype=torch.uint8).view(3, 1, 1).repeat(1, height, width)
    for (x1, y1, x2, y2), colour in ((red, RED), (green, GREEN)):
        image[:, y1:y2, x1:x2] = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)
    return image


def seen_box(image: Tensor, channel: int) -> list[int] | None:
    """The box around the pixels that are mostly of a colour."""
    ink = image[channel] > 140
    if not ink.any():
        return None
    rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def sample_of(kind: str, image: Tensor, target: Any) -> dict[str, Any]:
    return read_sample((image, target), KINDS[kind], None)


def objects_of(image: Tensor, *boxes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    masks = torch.zeros(len(boxes), *image.shape[-2:], dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[y1:y2, x1:x2] = True
    target = {"boxes": torch.tensor(boxes).float(), "labels": torch.arange(len(boxes)), "masks": masks, **more}
    return sample_of("objects", image, target)


def check_objects(sample: dict[str, Any], tolerance: float) -> int:
    """How many objects are left; boxes and masks must lie where their colours are in the image."""
    (target,) = KINDS["objects"].collate([sample])
    image = sample["image"].as_subclass(Tensor)
    for label, box, mask in zip(target["labels"], target["boxes"], target["masks"]):
        expected = seen_box(image, int(label))
        assert expected is not None
        assert (box - torch.tensor(expected)).abs().max() <= tolerance, (label, box, expected)
        shown = image[int(label)] > 140
        assert int((shown != mask).sum()) <= tolerance * 2 * (sum(shown.shape)), (label, shown.sum(), mask.sum())
    return len(target["labels"])


RED_BOX, GREEN_BOX = (9, 6, 33, 27), (40, 21, 69, 39)


@pytest.mark.parametrize("shape", [(45, 80), (80, 75), (20, 70), (41, 70), (200, 333)])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_boxes_and_masks_lie_where_the_image_shows_them(fit: str, shape: tuple[int, int]) -> None:
    height, width = shape
    scale = min(height / 45, width / 80)
    red, green = (tuple(int(number * scale) for number in box) for box in (RED_BOX, GREEN_BOX))
    image = scene(height, width, red, green)
    found = fitted(objects_of(image, red, green), how(fit))
    assert found["image"].shape == (3, SIZE, SIZE)
    assert check_objects(found, 0.75) >= 1
    for seed in range(12):
        torch.manual_seed(seed)
        assert check_objects(finished(found, how(fit), augment=True), 0.75) >= 1


def test_cutting_and_flipping_are_exact() -> None:
    image = scene(45, 80, RED_BOX, GREEN_BOX)
    sample = objects_of(image, RED_BOX, GREEN_BOX)
    counts, orders = set(), set()
    for seed in range(40):
        torch.manual_seed(seed)
        found = finished(fitted(sample, how("cut")), how("cut"), augment=True)
        assert found["image"].shape == (3, SIZE, SIZE)
        counts.add(check_objects(found, 0))
        for label, channel in ((0, 0), (1, 1)):
            is_shown = seen_box(found["image"].as_subclass(Tensor), channel) is not None
            assert is_shown == (label in found["labels"].tolist())
        if len(found["labels"]) == 2:
            orders.add(bool(found["boxes"][0, 0] < found["boxes"][1, 0]))
    assert counts >= {1, 2} and orders == {True, False}


def test_without_augmentation_the_centre_is_cut_out() -> None:
    image = scene(45, 80, RED_BOX, GREEN_BOX)
    found = finished(fitted(objects_of(image, RED_BOX, GREEN_BOX), how("cut")), how("cut"), augment=False)
    assert torch.equal(found["image"].as_subclass(Tensor), image[:, 6:38, 24:56])
    assert found["boxes"].tolist() == [[0, 0, 9, 21], [16, 15, 32, 32]]


def test_objects_that_leave_the_image_are_gone_with_all_that_they_have() -> None:
    image = scene(40, 80, (2, 2, 10, 10), (36, 10, 44, 30))
    points = torch.tensor([[[5.0, 5.0, 1.0]], [[40.0, 20.0, 1.0]]])
    sample = objects_of(image, (2, 2, 10, 10), (36, 10, 44, 30), keypoints=points)
    found = fitted(sample, how("crop", 40))
    assert {name: len(found[name]) for name in ("boxes", "labels", "masks", "keypoints", "seen")} == dict.fromkeys(
        ("boxes", "labels", "masks", "keypoints", "seen"), 1
    )
    (target,) = KINDS["objects"].collate([found])
    assert target["labels"].tolist() == [1] and target["boxes"].tolist() == [[16, 10, 24, 30]]
    assert target["keypoints"].tolist() == [[[20, 20, 1]]] and int(target["masks"].sum()) == 8 * 20
    nothing = fitted(objects_of(image, (2, 2, 10, 10), keypoints=points[:1]), how("crop", 40))
    assert len(nothing["boxes"]) == len(nothing["masks"]) == len(nothing["seen"]) == 0


def test_a_sample_without_objects_goes_through_everything() -> None:
    for fit in ("pad", "crop", "cut"):
        sample = sample_of("objects", scene(45, 80, RED_BOX, GREEN_BOX), {"boxes": [], "labels": []})
        found = finished(fitted(sample, how(fit)), how(fit), augment=True)
        assert found["boxes"].shape == (0, 4) and found["image"].shape == (3, SIZE, SIZE)


# Masks of classes


@pytest.mark.parametrize("factor", [2, 3, 4, 7])
def test_a_smaller_mask_lies_over_its_image(factor: int) -> None:
    """Every step of the edge by a pixel, on average: the mask's centre is the image's."""
    offs = []
    for shift in range(factor):
        red = (shift + factor, factor, shift + 9 * factor, 9 * factor)
        image = scene(16 * factor, 16 * factor, red, (0, 0, 0, 0))
        mask = (image[0] > 0).to(torch.uint8)
        found = fitted(sample_of("mask", image, mask), how("pad", 16))
        columns = found["mask"].as_subclass(Tensor).nonzero()[:, 1].double() + 0.5
        offs.append(float(columns.mean()) - (red[0] + red[2]) / 2 / factor)
    assert abs(float(np.mean(offs))) <= 0.5 / factor + 1e-9


def test_what_is_padded_is_grey_and_does_not_count() -> None:
    image = scene(16, 32, (4, 4, 12, 12), (20, 2, 30, 14))
    mask = (image[0] > 0).to(torch.uint8) + 2 * (image[1] > 0).to(torch.uint8)
    found = fitted(sample_of("mask", image, mask), how("pad"))
    classes = found["mask"].as_subclass(Tensor)
    assert torch.equal(found["image"][:, 8:24], image) and torch.equal(classes[8:24], mask)
    for rows in (slice(0, 8), slice(24, 32)):
        assert (found["image"][:, rows] == GREY).all() and (classes[rows] == IGNORED).all()


@pytest.mark.parametrize("fit", ["pad", "crop", "cut"])
def test_masks_move_with_their_images(fit: str) -> None:
    image = scene(40, 48, (4, 4, 20, 12), (24, 20, 44, 36))
    mask = (image[0] > 0).to(torch.uint8) + 2 * (image[1] > 0).to(torch.uint8)
    sample, moved = fitted(sample_of("mask", image, mask), how(fit)), set()
    for seed in range(20):
        torch.manual_seed(seed)
        found = finished(sample, how(fit), augment=True)
        pixels, classes = found["image"].as_subclass(Tensor), found["mask"].as_subclass(Tensor)
        shown = (pixels[0] > 127).to(torch.uint8) + 2 * (pixels[1] > 127).to(torch.uint8)
        counts = classes != IGNORED
        wrong = int((shown != classes)[counts].sum())
        assert wrong == 0 if fit == "cut" else wrong <= 40
        assert (pixels[:, ~counts] < GREY + 100).all()
        moved.add(classes.numpy().tobytes())
    assert len(moved) > 10


# Keypoints


def dot(height: int, width: int, points: list[tuple[int, int]]) -> Tensor:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for channel, (x, y) in enumerate(points):
        image[channel, y, x] = 255
    return image


@pytest.mark.parametrize("fit", ["pad", "crop", "cut"])
def test_keypoints_stay_on_what_they_mark(fit: str) -> None:
    """Points are marked by a pixel each, so that they show whether the image was flipped."""
    places = [(20, 11), (33, 16), (27, 30)]
    image = dot(40, 40, places)
    points = torch.tensor([[x + 0.5, y + 0.5, 1] for x, y in places])
    sample, unseen = fitted(sample_of("keypoints", image, points), how(fit, 40 if fit != "cut" else 32)), 0
    for seed in range(30):
        torch.manual_seed(seed)
        found = finished(sample, how(fit, 40 if fit != "cut" else 32), augment=True)
        (target,) = KINDS["keypoints"].collate([found])
        for channel, (x, y, is_seen) in enumerate(target.tolist()):
            shown = (found["image"].as_subclass(Tensor)[channel] == 255).nonzero()
            assert is_seen == len(shown)
            unseen += not is_seen
            if is_seen:
                assert shown.tolist() == [[int(y), int(x)]]
    assert unseen or fit != "cut"


def test_points_scale_with_the_image_and_those_beyond_its_window_are_not_seen() -> None:
    points = torch.tensor([[10.0, 20.0, 1.0], [70.0, 30.0, 1.0], [40.0, 39.0, 0.0]])
    for fit, expected in (
        ("pad", [[4, 16, 1], [28, 20, 1], [16, 23.6, 0]]),
        ("crop", [[-8, 16, 0], [40, 24, 0], [16, 31.2, 0]]),
    ):
        sample = sample_of("keypoints", torch.zeros(3, 40, 80, dtype=torch.uint8), points)
        found = KINDS["keypoints"].collate([fitted(sample, how(fit))])[0]
        torch.testing.assert_close(found, torch.tensor(expected))


def test_a_point_beyond_the_image_is_not_seen_where_that_is_padded() -> None:
    points = torch.tensor([[40.0, -5.0, 1.0], [40.0, 45.0, 1.0], [40.0, 5.0, 1.0]])
    found = fitted(sample_of("keypoints", torch.zeros(3, 40, 80, dtype=torch.uint8), points), how("pad"))
    assert KINDS["keypoints"].collate([found])[0].tolist() == [[16, 6, 0], [16, 26, 0], [16, 10, 1]]


def test_a_digits_leftmost_point_stays_its_leftmost() -> None:
    """A flip would make it the rightmost, and the points would have to change places."""
    scenes = digit_scenes(True, targets="keypoints", count=20)
    for index in range(20):
        sample = fitted(read_sample(scenes[index], KINDS["keypoints"], None), how("pad", 64))
        top, bottom, left, right = KINDS["keypoints"].collate([finished(sample, how("pad", 64), augment=True)])[0]
        assert top[1] <= bottom[1] and left[0] <= right[0]


# Images as targets


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("augment", [True, False])
def test_the_same_window_is_cut_out_of_a_larger_target(times: int, augment: bool) -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    target = image.repeat_interleave(times, 1).repeat_interleave(times, 2)
    sample, windows = fitted(sample_of("image", image, target), how("cut")), set()
    for _ in range(10):
        found = finished(sample, how("cut"), augment)
        pixels, larger = found["image"].as_subclass(Tensor), found["target"].as_subclass(Tensor)
        assert pixels.shape == (3, SIZE, SIZE)
        assert torch.equal(larger, pixels.repeat_interleave(times, 1).repeat_interleave(times, 2))
        windows.add(pixels.numpy().tobytes())
    assert len(windows) > 5 if augment else len(windows) == 1


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_targets_of_the_images_size_are_resized_and_moved_alike(fit: str) -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    found = finished(fitted(sample_of("image", image, image), how(fit)), how(fit), augment=True)
    assert torch.equal(found["image"].as_subclass(Tensor), found["target"].as_subclass(Tensor))


@pytest.mark.parametrize(
    ("fit", "target", "message"),
    [
        ("cut", (40, 51), r"an image of 50 x 40 pixels has a target of 51 x 40; expected the same size, or a whole"),
        ("cut", (20, 25), r"has a target of 25 x 20"),
        ("cut", (80, 150), r"has a target of 150 x 80"),
        ("pad", (80, 100), r"a target of another size than its image needs dataset\.fit=cut"),
        ("crop", (80, 100), r"a target of another size than its image needs dataset\.fit=cut"),
    ],
)
def test_targets_of_other_sizes_are_told(fit: str, target: tuple[int, int], message: str) -> None:
    sample = sample_of("image", torch.zeros(3, 40, 50, dtype=torch.uint8), torch.zeros(3, *target, dtype=torch.uint8))
    with pytest.raises(UserError, match=message):
        fitted(sample, how(fit))


def test_an_image_that_is_smaller_than_the_window_is_told_when_it_is_read() -> None:
    sample = sample_of("mask", torch.zeros(3, 40, 31, dtype=torch.uint8), torch.zeros(40, 31).long())
    with pytest.raises(UserError, match=r"has 31 x 40 pixels, and nothing is resized: set dataset\.image_size to 31"):
        fitted(sample, how("cut"))


# Images that are much longer than wide, and what classification does


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (7, 7), (500, 3)])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_images_of_any_form_get_their_size(fit: str, shape: tuple[int, int]) -> None:
    image = torch.full((3, *shape), 200, dtype=torch.uint8)
    found = fitted(sample_of("mask", image, torch.ones(shape).long()), how(fit, 24, 30 if fit == "crop" else None))
    assert found["image"].shape == (3, 24, 24) and found["mask"].shape == (24, 24)
    assert ((found["image"].as_subclass(Tensor) == 200).all(0) == (found["mask"].as_subclass(Tensor) == 1)).all()


def test_pillow_resizes_alike() -> None:
    image = torch.randint(0, 256, (3, 40, 80), dtype=torch.uint8)
    found = fitted(sample_of("mask", image, torch.zeros(40, 80).long()), how("pad"))["image"].as_subclass(Tensor)
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 16), Image.Resampling.BILINEAR)
    difference = found[:, 8:24].int() - torch.from_numpy(np.array(resized)).permute(2, 0, 1).int()
    assert int(difference.abs().max()) <= 1
