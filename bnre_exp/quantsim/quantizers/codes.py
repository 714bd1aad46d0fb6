"""Tensors of a layer that are integer codes times a scale."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnre_exp.quantsim.quantizers.quantizer import Dequantize


def set_codes(layer: nn.Module, name: str, codes: Tensor, dequantize: Dequantize) -> None:
    """Make ``layer.<name>`` ("weight" or "bias") the product of integer ``codes`` and the scale; in place.

    The codes become the buffer ``parametrizations.<name>.original``. An ordinary parameter, a buffer or None of that
    name is replaced.
    """
    if hasattr(layer, name):
        delattr(layer, name)
    layer.register_buffer(name, codes)
    parametrize.register_parametrization(layer, name, dequantize, unsafe=True)
