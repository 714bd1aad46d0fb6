"""Scenes of scikit-learn's digits on a canvas, with the class of every pixel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnre_exp import QuantScheme, calibrate, evaluate, quantize, reestimate_bn_stats
from bnre_exp.data import digits
from bnre_exp.tasks import Evaluation

Batches = list[tuple[Tensor, Tensor]]


def digit_masks(count: int, train: bool = True, size: int = 32) -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, S, S]`` in [0, 1] of two digits each, and masks int64 ``[N, S, S]``: 0 background, 1 a digit
    below 5, 2 another."""
    source, generator = digits(train), torch.Generator().manual_seed(int(train))
    images, masks = torch.zeros(count, 1, size, size), torch.zeros(count, size, size, dtype=torch.int64)
    for scene in range(count):
        for left in (0, size // 2):
            index = int(torch.randint(len(source), (), generator=generator))
            top = int(torch.randint(size - size // 2, (), generator=generator))
            digit = F.interpolate(source.images[index][None] / 255.0, size=size // 2, mode="bilinear")[0, 0]
            where = (scene, slice(top, top + size // 2), slice(left, left + size // 2))
            images[where[0], 0, where[1], where[2]] = digit
            masks[where][digit > 0.3] = 1 if int(source.labels[index]) < 5 else 2
    return images, masks


def batches(images: Tensor, targets: Tensor, size: int = 32) -> Batches:
    """Pairs of at most ``size`` samples."""
    return list(zip(images.split(size), targets.split(size)))


class UNet(nn.Module):
    """A small U-Net: two scales, BN after every convolution, and skip connections."""

    def __init__(self, outputs: int, width: int = 16) -> None:
        super().__init__()

        def block(inputs: int, channels: int, stride: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())

        self.first, self.down = block(1, width), block(width, 2 * width, 2)
        self.middle, self.up = block(2 * width, 2 * width), block(3 * width, width)
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        coarse = F.interpolate(self.middle(self.down(fine)), scale_factor=2.0)
        return self.head(self.up(torch.cat([fine, coarse], 1)))


def quantized_and_reestimated(
    model: nn.Module, bits: int, data: Batches, test: Batches, task: Any
) -> tuple[Any, Evaluation, Evaluation]:
    """A simulation with 8-bit activations, and what it gives before its BNs are re-estimated, and after."""
    sim = quantize(model, data[0][0], QuantScheme(bits, 8))
    calibrate(sim, data, 4)
    before = evaluate(sim, test, task=task)
    reestimate_bn_stats(sim, data, 8)
    calibrate(sim, data, 4)
    return sim, before, evaluate(sim, test, task=task)
