"""What calibration sees of a tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.ranges import fit_activation_range

MIN_SAMPLES = 1024

# By the numbers of values that samples were drawn from so far: positions of the last one, and the generator's state.
Draws = dict[tuple[int, ...], tuple[Tensor, Tensor]]


class RangeObserver:
    """Extremes of all values of a tensor, and a random sample of them. is_finite: whether all values were.

    draws: shared by observers that are to draw each random sample once, as they all draw alike.
    """

    def __init__(self, num_batches: int, samples: int = 2**17, draws: Draws | None = None) -> None:
        self.per_batch = max(MIN_SAMPLES, samples // num_batches)
        self.draws: Draws = {} if draws is None else draws
        self.drawn: tuple[int, ...] = ()  # from how many values each sample so far was drawn
        self.samples: list[Tensor] = []
        self.low, self.high = math.inf, -math.inf
        self.is_finite, self.was_called = True, False

    def observe(self, x: Tensor) -> None:
        """Take in one batch of values, any shape; there may be none."""
        self.was_called = True
        values = x.detach()
        if values.numel() == 0:
            return
        low, high = (float(end.float()) for end in torch.aminmax(_in_memory_order(values)))
        if not (math.isfinite(low) and math.isfinite(high)):  # Python's min and max would pass over NaN
            self.is_finite = False
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        if values.numel() > self.per_batch:
            values = values.take(self._drawn(values.numel()).to(values.device))
        self.samples.append(values.flatten().float().cpu())

    def _drawn(self, count: int) -> Tensor:
        """Random positions among ``count`` values, from a generator of the observer's own, which starts anew with it
        and changes no global random state."""
        before, self.drawn = self.drawn, (*self.drawn, count)
        if self.drawn not in self.draws:
            generator = torch.Generator().manual_seed(0)
            if before:
                generator.set_state(self.draws[before][1])
            index = torch.randint(count, (self.per_batch,), generator=generator)
            self.draws[self.drawn] = index, generator.get_state()
        return self.draws[self.drawn][0]

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


def _in_memory_order(x: Tensor) -> Tensor:
    """The values as they lie in memory where the tensor is in channels-last, so that nothing needs to be copied."""
    is_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1) if is_last else x
