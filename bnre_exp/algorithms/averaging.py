"""An exponential moving average of what is trained, and a network that has it for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Average:
    """The average of parameters over the steps of a training; it changes in place.

    parameters: what is averaged, by name; values: its average so far, by the same names; steps: how many are in it,
    ``[]`` in float64.
    """

    decay: float
    parameters: dict[str, Tensor]
    values: dict[str, Tensor]
    steps: Tensor

    @torch.no_grad()
    def add(self) -> None:
        """Take in the parameters as they are after a step.

        The newest of n steps has the weight (1 - decay) / (1 - decay^n), so that the parameters of before the training
        have none: the bias correction of Kingma and Ba, "Adam", ICLR 2015, section 3.
        """
        self.steps.add_(1)
        weight = (1 - self.decay) / (1 - self.decay ** float(self.steps))
        torch._foreach_lerp_(list(self.values.values()), list(self.parameters.values()), weight)

    @torch.no_grad()
    def write(self) -> None:
        """Put the average in the place of the parameters; without a step in it, nothing changes."""
        if float(self.steps):
            torch._foreach_copy_(list(self.parameters.values()), list(self.values.values()))


def average_of(model: nn.Module, decay: float) -> Average:
    """An average of all parameters that are trained, of which no step is in it yet. Takes the memory of a copy."""
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = {name: p.detach().clone() for name, p in trained.items()}
    return Average(decay, trained, values, torch.zeros((), dtype=torch.float64))


@contextmanager
def kept(parameters: dict[str, Tensor]) -> Iterator[None]:
    """In the end of the block the parameters have the values of its beginning, bit for bit, whatever happens."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters.values()), list(before.values()))
