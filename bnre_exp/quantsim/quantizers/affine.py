"""What remains of a BN that no layer takes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelAffine(nn.Module):
    """y = x * scale + bias, a value each per channel of axis 1; x: ``[N, C, ...]``."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.scale: Tensor
        self.bias: Tensor
        self.register_buffer("scale", torch.ones(num_channels))
        self.register_buffer("bias", torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return x * self.scale.reshape(shape) + self.bias.reshape(shape)

    def extra_repr(self) -> str:
        return str(self.num_channels)
