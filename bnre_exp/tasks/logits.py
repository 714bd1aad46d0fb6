"""Logits and the classes they are compared with, of one class a sample as of one a pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnre_exp.errors import UserError


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def classes_of(labels: Any, logits: Tensor, ignored: int | None = None) -> Tensor:
    """The labels as int64, on the logits' device. ignored: a label that stands for no class.

    Raises ``UserError`` unless they are one class of the network's for each of its outputs.
    """
    if logits.ndim < 2 or not logits.shape[1]:
        raise UserError(f"The network gives an output {list(logits.shape)}; expected logits [N, classes].")
    expected = [logits.shape[0], *logits.shape[2:]]
    is_whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not is_whole or list(labels.shape) != expected:
        got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise UserError(
            f"The labels of a batch are {got.removeprefix('torch.')}; expected classes, int64 {expected}. If they are "
            "elsewhere in the batch, target_fn(batch) returns them."
        )
    classes: Tensor = labels.to(logits.device, torch.int64)
    known = classes if ignored is None else classes[classes != ignored]
    low, high = torch.stack(known.aminmax()).tolist() if known.numel() else (0, 0)
    if low < 0 or high >= logits.shape[1]:
        raise UserError(
            f"The labels of a batch go from {low} to {high}; the network tells {logits.shape[1]} classes apart: "
            f"expected 0 to {logits.shape[1] - 1}. Number them from 0, or give the network as many outputs."
        )
    return classes
