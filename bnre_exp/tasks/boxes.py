"""Detections of images as one tensor, how good they are image by image, and how far those of two networks agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

MOST = 100  # detections an image that count, as in COCO's mAP
CONFIDENT = 0.25  # score from which a detection is shown to someone, and counts for the agreement of two networks
MARGIN = 0.1  # by how much a score may differ in another network
OVERLAP = 0.5  # intersection over union from which two boxes are of the same object
NEAR = 0.5  # pixels: boxes whose sides are no further apart are the same
X1Y1X2Y2, SCORE, LABEL = slice(0, 4), 4, 5  # columns of packed detections

Detections = Mapping[str, Tensor]  # of an image: boxes [n, 4] (x1, y1, x2, y2 [pixels]), scores [n], labels [n]


def packed(images: Sequence[Detections]) -> Tensor:
    """The best detections of each image, float32 ``[N, 100, 6]``: box, score, label; of those that are lacking, -1."""
    found = torch.zeros(len(images), MOST, 6)
    found[..., LABEL] = -1
    for place, image in enumerate(images):
        scores = image["scores"].detach().float().cpu()
        best = scores.argsort(descending=True, stable=True)[:MOST]
        boxes, labels = image["boxes"].detach().float().cpu(), image["labels"].detach().float().cpu()
        found[place, : len(best)] = torch.cat([boxes[best], scores[best, None], labels[best, None]], dim=1)
    return found


def agreement(first: Tensor, second: Tensor) -> float:
    """The part, in [0, 1], of the detections (packed; from a score of 0.25) of either network that the other has too:
    of the same class, with an intersection over union of at least 0.5, and a score above 0.15. 1 where there are
    none."""
    alike = count = 0
    for one, other in zip(first, second):
        for these, those in ((one, other), (other, one)):
            these, those = _above(these, CONFIDENT), _above(those, CONFIDENT - MARGIN)
            alike += int(_are_same(these, those).any(1).sum()) if len(those) else 0
            count += len(these)
    return alike / count if count else 1.0


def _above(detections: Tensor, score: float) -> Tensor:
    return detections[(detections[:, LABEL] >= 0) & (detections[:, SCORE] >= score)]


def _are_same(these: Tensor, those: Tensor) -> Tensor:
    is_one_class = these[:, None, LABEL] == those[None, :, LABEL]
    boxes, others = these[:, X1Y1X2Y2], those[:, X1Y1X2Y2]
    overlap_or_alike = box_iou(boxes, others) >= OVERLAP
    overlap_or_alike |= (boxes[:, None] - others[None, :]).abs().amax(2) <= NEAR  # boxes without area overlap nothing
    return is_one_class & overlap_or_alike


def image_score(detections: Tensor, boxes: Tensor, labels: Tensor) -> float:
    """How good the packed detections ``[100, 6]`` of one image are, in [0, 1]: their average precision over its objects
    (of the same class, with an intersection over union of at least 0.5). Without objects, 1 if no detection has a score
    of 0.25."""
    found = _above(detections, 0.0)
    if not len(boxes):
        return float(not len(_above(found, CONFIDENT)))
    if not len(found):
        return 0.0
    overlap = box_iou(found[:, X1Y1X2Y2], boxes.float())
    overlap[found[:, None, LABEL] != labels[None, :].float()] = 0
    is_free = torch.ones(len(boxes), dtype=torch.bool)
    right, total = 0, 0.0
    for rank, row in enumerate(overlap, start=1):  # from the highest score
        best = int(torch.where(is_free, row, -1.0).argmax())
        if is_free[best] and row[best] >= OVERLAP:
            is_free[best] = False
            right += 1
            total += right / rank
    return total / len(boxes)
