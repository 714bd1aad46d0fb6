"""Which elements of a weight belong to which output channel, for every conv and linear layer of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVS, *TRANSPOSED_CONVS, nn.Linear)
BATCH_NORMS = (_BatchNorm, FrozenBatchNorm2d)


@dataclass(frozen=True)
class WeightLayout:
    """Channel layout of a weight of ``ndim`` axes.

    Conv and linear weights are ``[C_out, C_in / groups, *kernel]``, transposed conv weights
    ``[C_in, C_out / groups, *kernel]`` with the output channels of each group side by side. A vector over channels has
    the shape ``[C_out]`` in the order of the layer's output, or ``[1]`` for a whole tensor.
    """

    ndim: int
    transposed: bool
    groups: int
    in_channels: int

    def expand(self, per_channel: Tensor) -> Tensor:
        """View a ``[C_out]`` or ``[1]`` vector so that it broadcasts against the weight."""
        kernel = (1,) * (self.ndim - 2)
        if per_channel.numel() == 1:  # one channel or the whole tensor, which broadcast alike
            return per_channel.reshape((1,) * self.ndim)
        if not self.transposed:
            return per_channel.reshape(-1, 1, *kernel)
        by_group = per_channel.reshape(self.groups, 1, -1).expand(-1, self.in_channels // self.groups, -1)
        return by_group.reshape(self.in_channels, -1, *kernel)

    def rows(self, weight: Tensor, per_channel: bool = True) -> Tensor:
        """The weight as ``[C_out, elements of the channel]``, or ``[1, all elements]``."""
        if not per_channel:
            return weight.reshape(1, -1)
        if not self.transposed:
            return weight.reshape(weight.shape[0], -1)
        by_group = weight.reshape(self.groups, self.in_channels // self.groups, weight.shape[1], -1)
        return by_group.transpose(1, 2).reshape(self.groups * weight.shape[1], -1)


def forward_of(module: Any) -> Any:
    """The function of its class that computes a module; None for one whose ``forward`` was replaced, and for others."""
    return None if "forward" in vars(module) else getattr(type(module), "forward", None)


def layout_of(layer: nn.Module) -> WeightLayout:
    """The layout of a layer's weight. Raises ``TypeError`` for anything but conv and linear layers."""
    if isinstance(layer, nn.Linear):
        return WeightLayout(ndim=2, transposed=False, groups=1, in_channels=layer.in_features)
    if isinstance(layer, (*CONVS, *TRANSPOSED_CONVS)):
        return WeightLayout(
            ndim=len(layer.kernel_size) + 2,
            transposed=layer.transposed,
            groups=layer.groups,
            in_channels=layer.in_channels,
        )
    raise TypeError(f"{type(layer).__name__} is neither a conv nor a linear layer")


def out_channels(layer: Any) -> int:
    """Channels of the layer's output."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
