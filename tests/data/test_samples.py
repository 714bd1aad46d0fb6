"""Targets of every kind: what is read, what is refused and in which words, and the batches of loaders."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bnre_exp.data import DataSpec, Loaders, Preprocessing, build_loaders
from bnre_exp.data.samples import KINDS, read_sample
from bnre_exp.errors import UserError


def image(height: int = 6, width: int = 9) -> Tensor:
    return torch.arange(3 * height * width, dtype=torch.uint8).reshape(3, height, width)


def read(kind: str, target: Any, num_classes: int | None = None) -> dict[str, Any]:
    return read_sample((image(), target), KINDS[kind], num_classes)


def collated(kind: str, *targets: Any) -> Any:
    return KINDS[kind].collate([read(kind, target) for target in targets])


# Masks


@pytest.mark.parametrize("form", ["tensor", "channel", "bool", "array", "16 bits", "L", "P", "1", "list"])
def test_masks_of_every_form_are_classes(form: str) -> None:
    classes = np.zeros((6, 9), np.uint8)
    classes[1:3, 4:8] = 1
    forms: dict[str, Any] = {
        "tensor": torch.from_numpy(classes).long(), "channel": torch.from_numpy(classes)[None],
        "bool": torch.from_numpy(classes).bool(), "array": classes.astype(np.int16),
        "16 bits": Image.fromarray(classes.astype(np.uint16)), "L": Image.fromarray(classes),
        "P": Image.fromarray(classes), "1": Image.fromarray(classes * 255).convert("1"),
        "list": classes.tolist(),
    }  # fmt: skip
    if form == "P":
        forms["P"].putpalette([255, 255, 255, 0, 200, 0])
        assert forms["P"].mode == "P"
    found = collated("mask", forms[form])
    assert found.dtype == torch.int64 and torch.equal(found[0], torch.from_numpy(classes).long())


def test_a_mask_is_turned_as_its_exif_data_say() -> None:
    classes = torch.arange(54, dtype=torch.uint8).reshape(6, 9)
    turned = Image.fromarray(classes.numpy()).transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    assert torch.equal(collated("mask", turned)[0], classes.long())


def test_255_counts_as_no_class() -> None:
    everything = torch.full((6, 9), 255)
    assert torch.equal(collated("mask", everything)[0], everything)
    assert KINDS["mask"].labels_of(read("mask", everything, 2)).tolist() == []
    everything[0, 0], everything[0, 1] = 1, 0
    assert KINDS["mask"].labels_of(read("mask", everything, 2)).tolist() == [0, 1]


ZEROS = torch.zeros(6, 9, dtype=torch.int64)
BOX, TWO = [[1.0, 2.0, 5.0, 4.0]], [[1.0, 2.0, 5.0, 4.0], [0.0, 0.0, 9.0, 6.0]]


def objects(boxes: Any = BOX, labels: Any = (0,), **more: Any) -> dict[str, Any]:
    return {"boxes": torch.tensor(boxes) if isinstance(boxes, list) else boxes, "labels": torch.tensor(labels), **more}


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("mask", Image.new("RGB", (9, 6)), "its mask is a picture of mode RGB; expected one class a pixel"),
        ("mask", ZEROS.T, "its mask is [9, 6]; expected [6, 9], as the image"),
        ("mask", torch.zeros(2, 6, 9).long(), "its mask is [2, 6, 9]; expected [6, 9]"),
        ("mask", ZEROS.float(), "the type of its mask is torch.float32; expected integers"),
        ("mask", None, "the type of its mask is NoneType; expected numbers"),
        ("mask", ZEROS + 256, "its mask goes from 256 to 256; expected 0 to 255"),
        ("mask", ZEROS - 1, "its mask goes from -1 to -1; expected 0 to 255"),
        ("mask", ZEROS + 3, "its classes go from 3 to 3; expected 0 to 1 (dataset.num_classes=2)"),
        ("image", ZEROS.float(), "its target: an image is a torch.float32 tensor of shape [1, 6, 9]"),
        ("image", np.zeros((6, 9)), "its target: an image is a ndarray"),
        ("keypoints", torch.zeros(4), "its keypoints are [4]; expected [K, 2] or [K, 3]"),
        ("keypoints", torch.zeros(4, 4), "its keypoints are [4, 4]"),
        ("keypoints", torch.zeros(1, 4, 2), "its keypoints are [1, 4, 2]"),
        ("keypoints", [[1, float("nan"), 1]], "its keypoints are not all finite"),
        ("keypoints", [[1, 2], [1]], "the type of its keypoints is list; expected numbers"),
        ("keypoints", "nose", "the type of its keypoints is str; expected numbers"),
        ("objects", [], "its target is a list without boxes and labels; expected a dict of them"),
        ("objects", {"boxes": BOX}, "its target is a dict without boxes and labels"),
        ("objects", objects(labels=[0, 1]), "it has 1 boxes with labels [2]; expected one a box"),
        ("objects", objects(labels=[[0]]), "it has 1 boxes with labels [1, 1]"),
        ("objects", objects(labels=[0.0]), "the type of its labels is torch.float32; expected integers"),
        ("objects", objects(labels=[True]), "the type of its labels is torch.bool; expected integers"),
        ("objects", objects(labels=[2]), "its classes go from 2 to 2; expected 0 to 1 (dataset.num_classes=2)"),
        ("objects", objects(labels=[-1]), "its classes go from -1 to -1; expected 0 to 1"),
        ("objects", objects([1.0, 2.0, 5.0, 4.0]), "its boxes are [4]; expected [n, 4]: x1, y1, x2, y2 in pixels"),
        ("objects", objects([[1.0, 2.0, 5.0, 4.0, 1.0]]), "its boxes are [1, 5]"),
        ("objects", objects(torch.ones(4, 2), [0, 1]), "its boxes are [4, 2]"),
        ("objects", objects([[1.0, 2.0, 1.0, 4.0]]), "1 of its 1 boxes are empty or outside of the image of 9 x 6"),
        ("objects", objects([*BOX, [5.0, 4.0, 1.0, 2.0]], [0, 0]), "1 of its 2 boxes are empty or outside"),
        ("objects", objects([[1.0, 2.0, 5.0, 7.5]]), "such as [1.0, 2.0, 5.0, 7.5]"),
        ("objects", objects([[-2.0, 2.0, 5.0, 4.0]]), "outside of the image of 9 x 6 pixels"),
        ("objects", objects([[1.0, 2.0, float("nan"), 4.0]]), "such as [1.0, 2.0, nan, 4.0]"),
        ("objects", objects(masks=torch.ones(2, 6, 9).bool()), "its masks are [2, 6, 9]; expected [1, 6, 9]"),
        ("objects", objects(masks=torch.ones(1, 9, 6).bool()), "its masks are [1, 9, 6]; expected [1, 6, 9]"),
        ("objects", objects(masks=torch.ones(1, 6, 9)), "the type of its masks is torch.float32; expected integers"),
        ("objects", objects(keypoints=torch.ones(2, 5, 3)), "it has 1 boxes and keypoints [2, 5, 3]; expected [boxes"),
        ("objects", objects(keypoints=torch.ones(1, 5)), "its keypoints are [1, 5]; expected [boxes, K, 2 or 3]"),
        ("objects", objects(keypoints=torch.full((1, 5, 3), torch.inf)), "its keypoints are not all finite"),
    ],
)  # fmt: skip
def test_targets_that_do_not_fit_are_told(kind: str, target: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read(kind, target, 2)


@pytest.mark.parametrize("item", [image(), (image(),), {"image": image()}])
def test_items_that_are_no_pairs_are_told(item: Any) -> None:
    with pytest.raises(UserError, match=r"it is a (Tensor|tuple|dict); expected a pair \(image, mask of classes"):
        read_sample(item, KINDS["mask"], None)


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("image", (image(), image()[:1]), "the target images of a batch are [3, 6, 9] and [1, 6, 9]"),
        ("keypoints", (torch.ones(4, 2), torch.ones(5, 2)), "the keypoints of a batch are [4, 3] and [5, 3]"),
        ("any", (torch.ones(2), torch.ones(3)), "the targets of a batch cannot be put together"),
        ("any", ([1], [1, 2]), "the targets of a batch cannot be put together"),
        ("any", ({"a": 1}, {"b": 1}), "the targets of a batch cannot be put together"),
        ("any", (None, None), "the targets of a batch cannot be put together"),
    ],
)  # fmt: skip
def test_targets_that_make_no_batch_are_told(kind: str, targets: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        collated(kind, *targets)


# What is read


def test_points_outside_of_the_image_and_those_marked_so_are_not_seen() -> None:
    points = [[0.0, 0.0, 2], [8.9, 5.9, 1], [9.0, 1.0, 2], [1.0, 6.0, 2], [-0.1, 1.0, 2], [3.0, 3.0, 0]]
    found = collated("keypoints", points)
    assert found.shape == (1, 6, 3) and found[0, :, 2].tolist() == [1, 1, 0, 0, 0, 0]
    torch.testing.assert_close(found[0, :, :2], torch.tensor(points)[:, :2])
    assert collated("keypoints", torch.tensor(points)[:, :2])[0, :, 2].tolist() == [1, 1, 0, 0, 0, 1]


def test_objects_are_read_with_all_of_their_entries() -> None:
    masks = torch.zeros(2, 6, 9, dtype=torch.int64)
    masks[0, 2:4, 1:5], masks[1] = 256, 255  # anything but 0 belongs to the object
    points = torch.tensor([[[1.0, 2.0, 1.0]], [[3.0, 3.0, 0.0]]])
    (found,) = collated("objects", objects(TWO, [1, 0], masks=masks, keypoints=points))
    assert found["boxes"].tolist() == TWO and found["labels"].tolist() == [1, 0]
    assert found["masks"].dtype == torch.bool and torch.equal(found["masks"], masks > 0)
    assert torch.equal(found["keypoints"], points)
    assert found["boxes"].dtype == torch.float32 and found["labels"].dtype == torch.int64


@pytest.mark.parametrize("boxes", [[], torch.zeros(0), torch.zeros(0, 4)])
def test_an_image_may_have_no_objects(boxes: Any) -> None:
    (found,) = collated("objects", {"boxes": boxes, "labels": [], "masks": [], "keypoints": []})
    assert found["boxes"].shape == (0, 4) and found["labels"].shape == (0,) and found["labels"].dtype == torch.int64
    assert found["masks"].shape == (0, 6, 9) and "keypoints" not in found


def test_boxes_may_reach_over_the_edge_by_a_rounding() -> None:
    (found,) = collated("objects", objects([[-0.5, -1.0, 10.0, 6.9]]))
    assert found["boxes"].tolist() == [[-0.5, -1.0, 10.0, pytest.approx(6.9)]]


def test_anything_makes_batches_as_torch_does() -> None:
    assert collated("any", 1.5, 2.5).tolist() == [1.5, 2.5]
    found = collated("any", {"a": torch.ones(2), "b": 1}, {"a": torch.zeros(2), "b": 2})
    assert found["a"].tolist() == [[1, 1], [0, 0]] and found["b"].tolist() == [1, 2]


# Loaders


class Drawn(Dataset[Any]):
    """12 images with a target of every kind, drawn from their number."""

    def __init__(self, train: bool, root: str | None, targets: str, change: int = 0, wrong: int = -1) -> None:
        self.targets, self.change, self.wrong, self.offset = targets, change, wrong, 0 if train else 12

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if index == self.wrong:
            return image(), "nonsense"
        generator = torch.Generator().manual_seed(index + self.offset)
        pixels = torch.randint(0, 256, (3, 20, 24 + index), generator=generator, dtype=torch.uint8)
        if self.targets == "image":
            target = 255 - pixels
            target[0, 0, 0] += self.change
            return pixels, target
        mask = (pixels[0] > 127).to(torch.uint8)
        mask[10, 12] += self.change
        points = torch.tensor([[4.0, 5.0, 2.0], [20.0 + self.change, 10.0, 1.0]])
        boxes, labels = torch.tensor([[2.0, 3.0, 15.0 + self.change, 16.0]] * (index % 3)), torch.arange(index % 3)
        full = {"boxes": boxes, "labels": labels, "masks": torch.stack([mask] * 3)[: index % 3]}
        full["keypoints"] = torch.stack([points] * 3)[: index % 3]
        value = [index / 2 + self.change, 1.0]
        return pixels, {"mask": mask, "keypoints": points, "objects": full, "any": torch.tensor(value)}[self.targets]


FITS = {"mask": "pad", "image": "cut", "keypoints": "pad", "objects": "crop", "any": "crop"}


def loaders_of(kind: str, **changes: Any) -> Loaders:
    how = Preprocessing(16, 16, (0.3,) * 3, (0.2,) * 3, fit=FITS[kind])
    options: dict[str, Any] = {"batch_size": 4, "eval_batch_size": 5, "val_fraction": 0.25, "targets": kind, **changes}
    return build_loaders(DataSpec(f"{__name__}.Drawn", **options), preprocessing=how)


def parts(batches: Any) -> list[Tensor]:
    """The images and all tensors of the targets, batch by batch."""
    found = list[Tensor]()
    for images, target in batches:
        entries = [target] if isinstance(target, Tensor) else [v for one in target for _, v in sorted(one.items())]
        found += [images, *entries]
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


SHAPES = {"mask": (16, 16), "image": (3, 16, 16), "keypoints": (2, 3), "any": (2,)}
DTYPES = {"mask": torch.int64}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_loaders_give_batches_of_every_kind(kind: str, in_memory: bool) -> None:
    loaders = loaders_of(kind, in_memory=in_memory, augment=True)
    assert {role: len(where) for role, where in loaders.indices.items()} == {
        "train": 9, "calibration": 9, "reestimation": 9, "validation": 3, "test": 12,
    }  # fmt: skip
    for loader, sizes in ((loaders.train, [4, 4]), (loaders.calibration, [4, 4]), (loaders.test, [5, 5, 2])):
        batches = list(loader)
        assert [tuple(images.shape) for images, _ in batches] == [(size, 3, 16, 16) for size in sizes]
        for images, target in batches:
            assert images.dtype == torch.float32
            if kind != "objects":
                assert target.shape == (len(images), *SHAPES[kind])
                assert target.dtype == DTYPES.get(kind, torch.float32)
                continue
            assert len(target) == len(images) and any(len(one["boxes"]) for one in target)
            for one in target:
                n = len(one["boxes"])
                assert one["boxes"].shape == (n, 4) and one["labels"].shape == (n,)
                assert one["masks"].shape == (n, 16, 16) and one["masks"].dtype == torch.bool
                assert "keypoints" not in one or one["keypoints"].shape == (n, 2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_depend_on_the_seed_alone(kind: str) -> None:
    loaders, others = loaders_of(kind, augment=True), loaders_of(kind, augment=True, in_memory=False, workers=2)
    once = parts(loaders.fresh("train"))
    torch.rand(3)
    assert same(once, parts(loaders.fresh("train"))) and same(once, parts(others.fresh("train")))
    assert not same(once, parts(loaders_of(kind, augment=True, seed=1).train))
    assert not same(once, parts(loaders.fresh("calibration")))
    assert same(parts(loaders.fresh("test")), parts(others.fresh("test")))
    assert torch.equal(loaders.example(), others.example())


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_are_written_to_leave_the_next_ones_alone(kind: str) -> None:
    loaders = loaders_of(kind)
    before = [part.clone() for part in parts(loaders.fresh("test"))]
    for part in parts(loaders.fresh("test")):
        part.zero_()
    assert same(before, parts(loaders.fresh("test")))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_digests_tell_a_change_of_the_targets(kind: str, in_memory: bool) -> None:
    first, again, changed = (
        loaders_of(kind, in_memory=in_memory, kwargs={"change": change}).digests for change in (0, 0, 1)
    )
    assert first == again and first["train"] != changed["train"] and first["train"] != first["test"]


def test_classes_of_all_targets_are_counted() -> None:
    assert loaders_of("mask").label_range == {"train": (0, 1), "test": (0, 1)}
    assert loaders_of("objects").num_classes_seen == 2
    assert loaders_of("keypoints").label_range == {} and loaders_of("keypoints").num_classes_seen == 0


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", ["mask", "image", "keypoints", "objects"])
def test_an_item_that_cannot_be_used_is_named(kind: str, in_memory: bool) -> None:
    with pytest.raises(UserError, match=r"^dataset: item 7: (its target|the type of its).*[^.]\.$"):
        loaders_of(kind, in_memory=in_memory, kwargs={"wrong": 7})


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_is_found_to_be_wrong_while_training_is_named(workers: int) -> None:
    loaders = loaders_of("mask", in_memory=False, workers=workers)
    for loader in (loaders.train, loaders.test):
        dataset: Any = loader.dataset
        dataset.read.args[0].wrong = 3
    with pytest.raises(UserError, match=r"^dataset: item 3: the type of its mask is str"):
        list(loaders.test)
