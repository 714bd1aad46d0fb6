"""Small networks, one a pattern, and data that tell a wrong implementation from a right one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and BN statistics; of each BN one gamma is zero, and about half of the others are negative."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
        for module in model.modules():
            if not isinstance(module, _BatchNorm):
                continue
            count = module.num_features
            if module.weight is not None:
                module.weight.copy_(torch.randn(count, generator=generator))
                module.weight[0] = 0.0
                module.weight[-1] = -1.5
            if module.running_mean is not None:
                module.running_mean.copy_(torch.randn(count, generator=generator))
                module.running_var.copy_(torch.rand(count, generator=generator) * 3 + 0.1)
    return model


def unequal_batches(shape: Sequence[int], sizes: Sequence[int] = (8, 5, 11, 3), seed: int = 1) -> list[Tensor]:
    """Batches ``[size, *shape]`` whose distributions differ from one another."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=generator) * (i + 1) + i for i, size in enumerate(sizes)]


class Net(nn.Module):
    """A network from modules and a forward function over them."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.steps = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def flat_cnn() -> nn.Sequential:
    """The flat network that AIMET can fold: conv, BN, ReLU, depthwise conv, BN, linear."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )
