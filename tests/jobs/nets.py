"""A network that the tests' whole jobs train in a moment."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A residual block behind two convolutions; weights enough that a checkpoint is mostly they."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 128, 3, 2, 1, bias=False), nn.BatchNorm2d(128)
        self.conv3, self.bn3 = nn.Conv2d(128, 128, 3, 2, 1, bias=False), nn.BatchNorm2d(128)
        self.conv4, self.bn4 = nn.Conv2d(128, 128, 3, 1, 1, bias=False), nn.BatchNorm2d(128)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        x = torch.relu(self.bn3(self.conv3(x)))
        x = torch.relu(self.bn4(self.conv4(x)) + x)
        return self.fc(x.mean((2, 3)))


class Tied(Residual):
    """Two of its layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv4.weight = self.conv3.weight
