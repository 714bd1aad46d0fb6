"""What networks are wrapped in to be run in parallel, compiled or averaged, and copies of them."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from bnre_exp.errors import UserError

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def wrapped(model: Any) -> nn.Module | None:
    """What a wrapper runs, None for anything else."""
    kind = type(model)
    if isinstance(model, WRAPPERS):
        return model.module  # type: ignore[no-any-return]
    if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch."):
        return model._orig_mod  # type: ignore[no-any-return]
    if kind.__module__.startswith("timm.utils.model_ema"):
        return getattr(model, "module", None) or getattr(model, "ema", None)
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The network that wrappers run in parallel, compiled or averaged; itself where there are none."""
    while (inner := wrapped(model)) is not None:
        model = inner
    return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Raises ``UserError`` if the network holds something that cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UserError(f"The network cannot be copied (copy.deepcopy): {type(error).__name__}: {error}") from error
