"""A small detector, whose parts are simulated in tests, and what is fed to it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bnre_exp import QuantScheme, calibrate, fold_batch_norms, quantize, quantize_biases
from tests.networks import randomize, unequal_batches

PARTS = ["backbone", "head"]
LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 1, 0])  # of the first batch


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Backbone(nn.Module):
    """Two maps by name; the first is half as large as the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = block(3, 8, 2), block(8, 8, 2)
        self.width = 8

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        fine = self.stem(x)
        return OrderedDict(fine=fine, coarse=self.down(fine))


class Head(nn.Module):
    """Boxes and scores of all places of all maps, ``[N, C, places]``; one tower for all maps."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.box, self.score = block(8, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)
        self.register_buffer("class_weights", torch.tensor([1.0, 2.0, 0.5]))

    def forward(self, maps: list[Tensor], *, stride: float) -> tuple[Tensor, Tensor]:
        towers = [self.tower(x) for x in maps]
        boxes = torch.cat([self.box(x).flatten(2) for x in towers], dim=2)
        return boxes * stride, torch.cat([self.score(x).flatten(2) for x in towers], dim=2)

    def losses(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
        sizes = boxes.abs().mean() if self.training else boxes.new_zeros(())
        return {"box": sizes, "score": F.cross_entropy(scores.mean(2), labels, self.class_weights)}


class Detector(nn.Module):
    """After torchvision's: losses in training mode, else a list of as many boxes and scores as each image has."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize, self.backbone, self.head = nn.BatchNorm2d(3), Backbone(), Head()

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        maps = self.backbone(self.normalize(images))
        boxes, scores = self.head([maps.popitem(last=False)[1], *maps.values()], stride=float(self.backbone.width))
        if self.training:
            return self.head.losses(boxes, scores, labels)
        results = []
        for box, score in zip(boxes, scores.softmax(1)):
            keep = score.amax(0) > 0.6
            if not keep.any():
                keep[score.amax(0).argmax()] = True
            results.append((box[:, keep], score[:, keep]))
        return results


def detector(seed: int = 0) -> Detector:
    """In evaluation mode, with random weights and statistics."""
    return randomize(Detector(), seed).eval()  # type: ignore[return-value]


def images() -> list[Tensor]:
    """Batches of unequal sizes and distributions."""
    return unequal_batches((3, 16, 16))


def folded_detector(model: nn.Module, **scheme: Any) -> nn.Module:
    """Calibrated and folded, with biases on the grid."""
    sim = quantize(model, images()[0], QuantScheme(**scheme), submodules=PARTS)
    calibrate(sim, images(), num_batches=4)
    folded, _ = fold_batch_norms(sim)
    quantize_biases(folded)
    return folded


def tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def equal(first: Any, second: Any) -> bool:
    """Whether all tensors are, bit for bit."""
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    return len(pairs) > 0 and all(a.dtype == b.dtype and _equal(a, b) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
