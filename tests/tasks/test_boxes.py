"""Detections as one tensor, their agreement, and how good those of an image are: small cases that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from bnre_exp.tasks.boxes import agreement, image_score, packed

BOX, NEXT, FAR = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0], [50.0, 50.0, 60.0, 60.0]
HALF, LESS = [0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 4.9]


def image(*rows: tuple[list[float], float, int]) -> dict[str, Tensor]:
    """Detections: box, score, label."""
    return {
        "boxes": torch.tensor([box for box, _, _ in rows]).reshape(-1, 4),
        "scores": torch.tensor([score for _, score, _ in rows]),
        "labels": torch.tensor([label for _, _, label in rows], dtype=torch.int64),
    }


def agree(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    found = agreement(packed([first]), packed([second]))
    assert found == agreement(packed([second]), packed([first]))
    return found


def test_detections_are_packed_from_the_best_on_and_the_lacking_have_no_label() -> None:
    found = packed([image((BOX, 0.2, 3), (FAR, 0.9, 0)), image()])
    assert found.shape == (2, 100, 6) and found.dtype == torch.float32
    torch.testing.assert_close(found[0, :2], torch.tensor([[*FAR, 0.9, 0], [*BOX, 0.2, 3]]))
    assert bool((found[0, 2:, 5] == -1).all()) and bool((found[1, :, 5] == -1).all())
    assert not found[0, 2:, :5].any() and packed([]).shape == (0, 100, 6)


def test_of_many_detections_the_hundred_best_stay_and_ties_keep_their_order() -> None:
    scores = torch.linspace(1, 0, 130)[torch.randperm(130)]
    many = {"boxes": torch.rand(130, 4), "scores": scores, "labels": torch.arange(130)}
    (found,) = packed([many])
    best = scores.topk(100)
    assert torch.equal(found[:, 4], best.values) and torch.equal(found[:, 5].long(), best.indices)
    tied = {**many, "scores": torch.ones(130)}
    assert torch.equal(packed([tied])[0, :, 5].long(), torch.arange(100))


def test_half_precision_and_gradients_are_packed() -> None:
    given = image((BOX, 0.5, 1))
    given["boxes"] = given["boxes"].half().requires_grad_()
    assert not packed([given]).requires_grad and packed([given])[0, 0].tolist() == [*BOX, 0.5, 1]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (image(), image(), 1.0),
        (image((BOX, 0.9, 1)), image(), 0.0),
        (image((BOX, 0.9, 1)), image((NEXT, 0.8, 1)), 1.0),
        (image((BOX, 0.9, 1)), image((NEXT, 0.8, 2)), 0.0),
        (image((BOX, 0.9, 1)), image((HALF, 0.9, 1)), 1.0),
        (image((BOX, 0.9, 1)), image((LESS, 0.9, 1)), 0.0),
        (image((BOX, 0.9, 1)), image((BOX, 0.2, 1)), 1.0),  # the second alone would not be shown
        (image((BOX, 0.9, 1)), image((BOX, 0.1, 1)), 0.0),
        (image((BOX, 0.2, 1)), image((FAR, 0.2, 1)), 1.0),  # none is shown
        (image((BOX, 0.9, 1), (FAR, 0.9, 1)), image((BOX, 0.9, 1)), 2 / 3),
        (image((BOX, 0.9, 1), (NEXT, 0.9, 1)), image((BOX, 0.9, 1)), 1.0),
    ],
)
def test_agreement_of_one_image(first: dict[str, Tensor], second: dict[str, Tensor], expected: float) -> None:
    assert agree(first, second) == pytest.approx(expected)


def test_agreement_is_over_the_detections_of_all_images() -> None:
    first = packed([image((BOX, 0.9, 1), (FAR, 0.9, 1)), image((BOX, 0.5, 0)), image()])
    second = packed([image((BOX, 0.9, 1), (FAR, 0.9, 1)), image((FAR, 0.5, 0)), image()])
    assert agreement(first, second) == pytest.approx(4 / 6) and agreement(first, first) == 1
    assert agreement(first[:0], second[:0]) == 1


@pytest.mark.parametrize(
    ("found", "objects", "expected"),
    [
        (image(), image(), 1.0),
        (image((BOX, 0.2, 1)), image(), 1.0),
        (image((BOX, 0.3, 1)), image(), 0.0),
        (image(), image((BOX, 1, 1)), 0.0),
        (image((BOX, 0.01, 1)), image((BOX, 1, 1)), 1.0),
        (image((BOX, 0.9, 2)), image((BOX, 1, 1)), 0.0),
        (image((HALF, 0.9, 1)), image((BOX, 1, 1)), 1.0),
        (image((LESS, 0.9, 1)), image((BOX, 1, 1)), 0.0),
        (image((FAR, 0.9, 1), (BOX, 0.8, 1)), image((BOX, 1, 1)), 0.5),
        (image((BOX, 0.9, 1), (FAR, 0.8, 1)), image((BOX, 1, 1)), 1.0),
        (image((BOX, 0.9, 1), (BOX, 0.8, 1)), image((BOX, 1, 1), (FAR, 1, 1)), 0.5),
        (image((BOX, 0.9, 1), (BOX, 0.8, 1)), image((BOX, 1, 1), (NEXT, 1, 1)), 1.0),
        (image((BOX, 0.9, 1), (NEXT, 0.9, 1), (FAR, 0.9, 0)), image((FAR, 1, 0)), 1 / 3),
    ],
)
def test_the_score_of_one_image(found: dict[str, Tensor], objects: dict[str, Tensor], expected: float) -> None:
    assert image_score(packed([found])[0], objects["boxes"], objects["labels"]) == pytest.approx(expected)


def test_the_score_of_an_image_is_near_its_average_precision() -> None:
    """torchmetrics' has a precision that is made to fall, read at 101 recalls, so that it is somewhat higher."""
    for seed in range(12):
        torch.manual_seed(seed)
        corners = torch.rand(6, 2) * 60
        boxes = torch.cat([corners, corners + 20], 1)
        near = torch.cat(
            [boxes + 4 * torch.randn(6, 4), torch.rand(4, 2).repeat(1, 2) * 40 + torch.tensor([0, 0, 9, 9])]
        )
        labels = torch.zeros(6, dtype=torch.int64)
        found = {"boxes": near, "scores": torch.rand(10), "labels": torch.zeros(10, dtype=torch.int64)}
        peer = MeanAveragePrecision(iou_thresholds=[0.5])
        peer.update([found], [{"boxes": boxes, "labels": labels}])
        score, expected = image_score(packed([found])[0], boxes, labels), float(peer.compute()["map"])
        assert score <= expected + 0.01 and expected - score < 0.15
        right = box_iou(near, boxes).amax(0) >= 0.5
        assert score <= float(right.float().mean()) + 1e-6


def test_boxes_without_area_agree_with_themselves() -> None:
    """Their intersection over union, with themselves too, is none."""
    line = [4.0, 4.0, 4.0, 20.0]
    assert agree(image((line, 0.9, 1)), image((line, 0.9, 1))) == 1
    assert agree(image((line, 0.9, 1)), image(([4.0, 6.0, 4.0, 20.0], 0.9, 1))) == 0
