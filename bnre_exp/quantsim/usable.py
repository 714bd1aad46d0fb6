"""Tensors of a network that nothing can be computed with: not finite, or a negative variance."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, LAYERS
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer

SHOWN = 3


@torch.no_grad()
def unusable_tensors(network: nn.Module) -> list[str]:
    """Weights, biases, scales and statistics of layers, batch norms and quantizers that hold such values, with what is
    wrong. Activation quantizers without a range have none to hold."""
    found = []
    for name, module in network.named_modules():
        has_range = isinstance(module, ActivationQuantizer) and module.has_range
        if not (has_range or isinstance(module, (*LAYERS, *BATCH_NORMS))):
            continue
        for key, tensor in itertools.chain(module.named_parameters(name), module.named_buffers(name)):
            if not tensor.is_floating_point():
                continue
            shown = key.replace("parametrizations.", "").replace(".original", "")
            if not bool(tensor.isfinite().all()):
                found.append(f"{shown} is not finite")
            elif key.endswith("running_var") and bool((tensor < 0).any()):
                found.append(f"{shown} is negative")
    return found


def refuse_unusable(network: nn.Module, what_for: str) -> None:
    """Raise ``UserError`` naming such tensors of ``network``."""
    found = unusable_tensors(network)
    if found:
        more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"{what_for}: {', '.join(found[:SHOWN])}{more}. Nothing can be computed with that; look for a "
            "training that diverged or a damaged checkpoint (statistics of a batch norm can be re-estimated)."
        )
