"""Quantizers of weights: on which grid each is, with which range, and what is to be said of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError, counted, few
from bnre_exp.quantsim.groups import Grouping, negative_gammas
from bnre_exp.quantsim.placement import WeightPlacement
from bnre_exp.quantsim.quantizers.layout import layout_of
from bnre_exp.quantsim.quantizers.quantizer import WeightQuantizer, narrow_quant_max
from bnre_exp.quantsim.quantizers.ranges import fit_symmetric_scale
from bnre_exp.quantsim.quantizers.scheme import FULL, QuantScheme

MANY_ZEROS = 0.5  # part of a layer's weights that are rounded to zero


def quantize_weights(
    sim: fx.GraphModule, grouping: Grouping, placed: Sequence[WeightPlacement], scheme: QuantScheme
) -> tuple[str, ...]:
    """Give the placed layers their weight quantizers, ranges fitted; in place. Returns what is to be noted.

    A channel whose gamma is negative is on the mirrored full grid from the start, so that the sign of its codes can
    change when BN is folded. One scale for a whole tensor is not mirrored: folding quantizes such weights anew. Which
    layer has which kind of grid depends on no values, since a state is loaded into a simulation of other ones. Raises
    ``UserError`` for a weight that is not finite.
    """
    negative, vanishing = negative_gammas(grouping), list[str]()
    for name, bits in ((place.name, place.bits) for place in placed):
        layer: Any = sim.get_submodule(name)
        weight: Tensor = layer.weight.detach()
        is_negative = torch.zeros(1, dtype=torch.bool, device=weight.device)
        is_negative = negative.get(name, is_negative) if scheme.per_channel else is_negative
        quantizer = _quantizer_of(name, layer, bits, scheme, is_negative if scheme.weight_grid == FULL else None)
        is_lost = (quantizer.codes(weight) == 0) & (weight != 0)
        vanishing += [name] if int(is_lost.sum()) > MANY_ZEROS * weight.numel() else []
        parametrize.register_parametrization(layer, "weight", quantizer)
    return _notes(vanishing, scheme)


def _quantizer_of(name: str, layer: Any, bits: int, scheme: QuantScheme, is_negative: Tensor | None) -> WeightQuantizer:
    """is_negative: channels whose grid is mirrored, ``[C_out]`` or ``[1]``; None: all are on the narrow grid."""
    layout, quant_max = layout_of(layer), narrow_quant_max(bits)
    rows = layout.rows(layer.weight.detach(), scheme.per_channel)
    if not bool(rows.isfinite().all()):
        raise UserError(f"quantize: the weight of {name} is not finite; look for a training that diverged.")
    if is_negative is None:
        scale = fit_symmetric_scale(rows, quant_max, scheme.weight_range, scheme.percentile)
        return WeightQuantizer(bits, layout, scale, scheme.range_learning, scheme.per_channel)
    # A mirrored grid fits a channel as the grid itself fits the negated one.
    rows = torch.where(is_negative[:, None], -rows, rows)
    scale = fit_symmetric_scale(rows, quant_max, scheme.weight_range, scheme.percentile, -quant_max - 1)
    zero_point = torch.where(is_negative, -1.0, 0.0).expand(scale.shape)
    return WeightQuantizer(bits, layout, scale, scheme.range_learning, scheme.per_channel, zero_point)


def _notes(vanishing: Sequence[str], scheme: QuantScheme) -> tuple[str, ...]:
    if not vanishing:
        return ()
    better = "more bits round" if scheme.weight_range == "mse" else "weight_range=mse rounds"
    return (
        f"more than half of the weights are rounded to zero in {counted(len(vanishing), 'layer')} "
        f"({few(vanishing)}) with weight_range={scheme.weight_range}; {better} fewer",
    )
