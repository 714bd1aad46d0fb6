"""Scenes of digits on a canvas, with all that is known about them, for detectors, segmenters and denoisers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from bnre_exp.data.datasets import digits, fashion_mnist
from bnre_exp.errors import UserError

SOURCES = {"digits": digits, "fashion_mnist": fashion_mnist}
COUNTS = {True: 1200, False: 300}  # scenes for training and for testing
TARGETS = ("objects", "mask", "image", "keypoints")
INK = 0.35  # of white, the least that belongs to a digit
TRIES = 30  # to find a place for a digit where it hides no other


class Scenes(Dataset[Any]):
    """Scenes as ``(image, target)``; each is made anew from the seed and its number, and always the same."""

    def __init__(
        self, images: Tensor, labels: Tensor, count: int, seed: int, targets: str, size: int, most: int, noise: float
    ) -> None:
        self.images, self.labels, self.count, self.seed = images, labels, count, seed
        self.targets, self.size, self.most, self.noise = targets, size, most, noise
        names = [str(number) for number in range(10)]
        self.classes = {"objects": names, "mask": ["background", *names]}.get(targets, [])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        number = range(self.count)[index]
        generator = torch.Generator().manual_seed(self.seed * 2**31 + number)  # it takes 32 bits of a seed
        clean, objects = self._placed(generator)
        noise = self.noise * torch.randn(clean.shape, generator=generator)
        image = _as_bytes(clean + noise)
        return image, self._target(clean, objects)

    def _target(self, clean: Tensor, objects: list[tuple[int, Tensor]]) -> Any:
        if self.targets == "image":
            return _as_bytes(clean)
        if self.targets == "mask":
            mask = torch.zeros(self.size, self.size, dtype=torch.uint8)
            for label, ink in objects:
                mask[ink] = 1 + label
            return mask
        boxes = torch.stack([_box(ink) for _, ink in objects])
        if self.targets == "keypoints":
            return _extremes(objects[0][1])
        labels, masks = torch.tensor([label for label, _ in objects]), torch.stack([ink for _, ink in objects])
        return {"boxes": boxes, "labels": labels, "masks": masks}

    def _placed(self, generator: torch.Generator) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """The scene without noise ``[1, S, S]`` in [0, 1], and of each digit its class and where its ink is."""

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        size = self.size
        slope = torch.rand(2, 1, generator=generator) * torch.linspace(0, 0.25, size)
        clean = (slope[0][:, None] + slope[1][None, :]).clone()
        taken, objects = torch.zeros(size, size, dtype=torch.bool), list[tuple[int, Tensor]]()
        for _ in range(1 if self.targets == "keypoints" else between(1, self.most)):
            which, side = between(0, len(self.images) - 1), between(size // 4, size * 7 // 16)
            digit = F.interpolate(self.images[which][None].float() / 255, size=[side, side], mode="bilinear")[0, 0]
            for _ in range(TRIES):
                top, left = between(0, size - side), between(0, size - side)
                place = (slice(top, top + side), slice(left, left + side))
                if not taken[place].any():
                    break
            else:
                continue  # no room is left
            taken[place] = True
            ink = torch.zeros(size, size, dtype=torch.bool)
            ink[place] = digit > INK * digit.amax()
            clean[place] = torch.maximum(clean[place], digit * (0.6 + 0.4 * float(torch.rand((), generator=generator))))
            objects.append((int(self.labels[which]), ink))
        return clean[None], objects


def _as_bytes(image: Tensor) -> Tensor:
    return (image * 255).round().clamp(0, 255).to(torch.uint8)


def _box(ink: Tensor) -> Tensor:
    """x1, y1, x2, y2 [pixels] of the box around the ink."""
    rows, columns = ink.any(1).nonzero(), ink.any(0).nonzero()
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=torch.float32)


def _extremes(ink: Tensor) -> Tensor:
    """Where a digit's ink begins and ends: its uppermost, lowest, leftmost and rightmost points, ``[4, 2]``."""
    rows, columns = ink.nonzero(as_tuple=True)
    ends = [rows.argmin(), rows.argmax(), columns.argmin(), columns.argmax()]
    return torch.stack([torch.stack([columns[end], rows[end]]) for end in ends]).float() + 0.5


def digit_scenes(
    train: bool, root: str | None = None, targets: str = "objects", of: str = "digits", size: int = 64, most: int = 4,
    noise: float = 0.1, count: int | None = None,
) -> Scenes:  # fmt: skip
    """Digits on a grey canvas, grayscale, 1 to ``most`` of them without overlap, and noise over all; 1200 + 300 scenes.

    targets: what a scene comes with: "objects", boxes, classes and masks of the digits; "mask", the class of each pixel
    (0: background, 1 + digit); "image", the scene without its noise; "keypoints", the uppermost, lowest, leftmost and
    rightmost point of the one digit in it. of: "digits", scikit-learn's, or "fashion_mnist", with ``root`` as there.
    size: of the canvas [pixels]. noise: standard deviation, of white. count: of scenes. Digits of test scenes are in no
    training scene.
    """
    if targets not in TARGETS:
        raise UserError(
            f"dataset digit_scenes has no targets of the kind {targets!r}, which the task takes; it serves detection, "
            "segmentation, regression and keypoints. For classification take dataset=digits."
        )
    if of not in SOURCES:
        raise UserError(f"dataset digit_scenes: of={of!r}; expected one of {', '.join(SOURCES)}.")
    if not (size >= 16 and most >= 1 and noise >= 0 and (count is None or count >= 1)):
        raise UserError("dataset digit_scenes: expected size >= 16, most >= 1, noise >= 0 and count >= 1.")
    source = SOURCES[of](train, root)
    return Scenes(source.images, source.labels, count or COUNTS[train], int(not train), targets, size, most, noise)
