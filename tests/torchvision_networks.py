"""Networks as torchvision makes them: whole, by their names, and small ones of the same blocks for tests that are not
about size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torchvision
from torch import nn
from torchvision.models.densenet import DenseNet
from torchvision.models.googlenet import BasicConv2d, Inception
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.resnet import BasicBlock
from torchvision.models.shufflenetv2 import InvertedResidual

from tests.networks import Net


def _sequence(*layers: nn.Module) -> nn.Module:
    return Net(lambda net, x: net.layers(x), layers=nn.Sequential(*layers))


def _small_resnet() -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    return _sequence(
        nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        BasicBlock(8, 8), BasicBlock(8, 12, 2, shortcut), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


def _small_mobilenet_v3() -> nn.Module:
    """Both activations, without squeeze-and-excite and an addition, and with them."""
    blocks = [(16, 3, 16, 16, False, "RE", 2), (16, 5, 32, 16, True, "HS", 1)]
    settings = [InvertedResidualConfig(*block, 1, 1) for block in blocks]
    return MobileNetV3(settings, last_channel=64, num_classes=10)


def _small_googlenet() -> nn.Module:
    return _sequence(
        BasicConv2d(3, 8, kernel_size=7, stride=2, padding=3), nn.MaxPool2d(3, 2, ceil_mode=True),
        Inception(8, 4, 6, 8, 2, 4, 4), nn.MaxPool2d(3, 2, ceil_mode=True), BasicConv2d(20, 12, kernel_size=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 10),
    )  # fmt: skip


def _small_shufflenet_v2() -> nn.Module:
    return _sequence(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        InvertedResidual(8, 16, 2), InvertedResidual(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


SMALL: dict[str, Callable[[], nn.Module]] = {
    "small resnet": _small_resnet,
    "small mobilenet_v2": lambda: MobileNetV2(10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]),
    "small mobilenet_v3": _small_mobilenet_v3,
    "small googlenet": _small_googlenet,
    "small shufflenet_v2": _small_shufflenet_v2,
    "small densenet": lambda: DenseNet(8, (2, 2), 8, 2, num_classes=10),
}


def network(name: str) -> nn.Module:
    """A new network with ten classes: one of SMALL, or torchvision's by its name."""
    if name in SMALL:
        return SMALL[name]()
    options = {"init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, num_classes=10, **options)


def small_or_slow(*names: str) -> list:
    """Values for ``parametrize``: what is not small is slow."""
    return [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in names]
