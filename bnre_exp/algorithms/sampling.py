"""How precisely batches tell the statistics of batch norms: standard errors, by which re-estimation may stop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_BATCHES = 4  # of fewer, the spread between batches says little


class SamplingErrors:
    """Standard errors of the mean and variance of every channel, from the spread of these between batches, in terms of
    what batch norm divides by: a channel whose variance is far below ``eps`` is next to constant behind it, however
    little is known of it.

    A batch is one observation, so that values that go together (pixels of an image) count as little as they tell.
    """

    def __init__(self, eps: Tensor) -> None:
        """eps: ``[C]``, that batch norm adds to the variance of each channel; on the channels' device."""
        self._eps = eps.double()
        self._counts = torch.zeros_like(self._eps)
        self._mean, self._squares = torch.zeros(2, 2, *eps.shape, dtype=torch.float64, device=eps.device)

    def add(self, mean: Tensor, var: Tensor, called: Tensor | None = None) -> None:
        """Take in the mean and unbiased variance of one batch, ``[C]`` each. called: bool ``[C]``, which channels were
        part of it; None: all."""
        weight = torch.ones_like(self._counts) if called is None else called.double()
        self._counts += weight
        values = torch.stack([mean.double(), var.double()])
        shift = (values - self._mean) * weight
        self._mean += shift / self._counts.clamp(min=1)
        self._squares += shift * (values - self._mean)

    def of_channels(self) -> tuple[Tensor, Tensor]:
        """Standard error of the mean, in roots of variance + eps, and of the variance, relative to variance + eps:
        float64 ``[C]`` each. Infinite for channels with fewer than :data:`MIN_BATCHES` observations."""
        variance = self._mean[1] + self._eps
        errors = (self._squares / (self._counts - 1).clamp(min=1) / self._counts.clamp(min=1)).sqrt()
        scales = torch.stack([variance.sqrt(), variance])
        errors = torch.where(errors > 0, errors / scales, 0.0)  # of a constant channel there is no error
        errors = torch.where(self._counts < MIN_BATCHES, torch.inf, errors)
        return errors[0], errors[1]

    def of_layers(self, sizes: Sequence[int]) -> list[float]:
        """The largest error of the channels of each layer. sizes: channels of each, in order; their sum is C."""
        worst = torch.maximum(*self.of_channels())
        return [float(part.max()) for part in worst.cpu().split(list(sizes))]
