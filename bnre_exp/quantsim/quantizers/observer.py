"""What calibration sees of a tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.ranges import fit_activation_range

MIN_SAMPLES = 1024


class RangeObserver:
    """Extremes of all values of a tensor, and a random sample of them. is_finite: whether all values were."""

    def __init__(self, num_batches: int, samples: int = 2**17) -> None:
        self.per_batch = max(MIN_SAMPLES, samples // num_batches)
        self.generator = torch.Generator().manual_seed(0)  # own, so that observing changes no global random state
        self.samples: list[Tensor] = []
        self.low, self.high = math.inf, -math.inf
        self.is_finite, self.was_called = True, False

    def observe(self, x: Tensor) -> None:
        """Take in one batch of values, any shape; there may be none."""
        self.was_called = True
        values = x.detach().flatten().float()
        if values.numel() == 0:
            return
        low, high = map(float, torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):  # Python's min and max would pass over NaN
            self.is_finite = False
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        if values.numel() > self.per_batch:
            index = torch.randint(values.numel(), (self.per_batch,), generator=self.generator)
            values = values[index.to(values.device)]
        self.samples.append(values.cpu())

    def fit(self, quantizer: Any, estimator: str, percentile: float) -> tuple[float, float]:
        """The range ``(low, high)`` for an activation quantizer; ``(0, 1)`` for a tensor without values.

        Raises ``UserError`` if a value was not finite, or the tensor was never computed.
        """
        if not self.is_finite:
            raise UserError(f"The activations of {quantizer.label} are not finite during calibration.")
        if not self.was_called:
            raise UserError(f"calibrate: {quantizer.label} was never computed; does forward_fn call the whole network?")
        values = torch.cat(self.samples) if self.samples else torch.zeros(1)
        low, high = (self.low, self.high) if self.samples else (0.0, 0.0)
        return fit_activation_range(values, low, high, quantizer.bits, quantizer.unsigned, estimator, percentile)
