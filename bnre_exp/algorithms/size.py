"""How large a folded network is on the target."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer, Dequantize


def packed_megabytes(folded: nn.Module) -> float:
    """Size of a folded network [MB, 1e6 bytes] with each integer code at its bitwidth, and everything else (scales,
    zero points, parameters and buffers that stay in floating point) as it is in memory."""
    bits, counted = 0.0, set()
    for module in folded.modules():
        if isinstance(module, ActivationQuantizer):
            bits += 8 * module.scale.element_size() * 2  # scale and zero point
            counted |= {id(module.scale), id(module.zero_point)}
        if not parametrize.is_parametrized(module):
            continue
        for parametrizations in module.parametrizations.values():  # type: ignore[union-attr, operator]
            for dequantize in parametrizations:
                if isinstance(dequantize, Dequantize) and id(parametrizations.original) not in counted:
                    bits += parametrizations.original.numel() * dequantize.bits
                    counted.add(id(parametrizations.original))
    for tensor in [*folded.parameters(), *folded.buffers()]:
        if id(tensor) not in counted:
            bits += 8 * tensor.numel() * tensor.element_size()
    return bits / 8 / 1e6
