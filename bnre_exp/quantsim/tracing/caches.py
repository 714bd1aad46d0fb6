"""Sizes that a network keeps of the inputs it has seen, to find out whether the next one has another."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bnre_exp.quantsim.tracing.tracer import resized


def forget_seen_sizes(model: nn.Module, examples: Sequence[Tensor]) -> None:
    """Set attributes that hold the size of an input that the network has seen to None, in place.

    A head that makes its anchors anew for every new size would be traced as it is for the size it saw last. Which
    attributes these are is told by a copy that is given batches of two sizes: sizes that change are of inputs.
    """
    kept = _sizes(model)
    if not kept:
        return
    tried = copy.deepcopy(model).eval()
    seen = []
    for size in (2, 3):
        try:
            with torch.no_grad():
                tried(*(resized(x, size) for x in examples))
        except Exception:  # a network that fails on its example is told of where it is traced or compared
            return
        seen.append(_sizes(tried))
    modules = dict(model.named_modules())
    for name, attribute in kept:
        if seen[0].get((name, attribute)) != seen[1].get((name, attribute)):
            setattr(modules[name], attribute, None)


def _sizes(model: nn.Module) -> dict[tuple[str, str], torch.Size]:
    """Attributes of modules that are sizes of tensors, by module and attribute."""
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Size)
    }
