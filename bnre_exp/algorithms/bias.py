"""Biases of a folded network on the integer grid on which the target adds them up."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError
from bnre_exp.quantsim.nodes import is_layer
from bnre_exp.quantsim.operations import input_quantizer
from bnre_exp.quantsim.quantizers.codes import set_codes
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer, Dequantize, positive
from bnre_exp.quantsim.whole import named, parts_of

SMALLEST_STEP = 2.0**-126  # the smallest float32 of full precision


@dataclass(frozen=True)
class BiasReport:
    """rounded: names of layers whose bias is on the grid; kept: ``(layer, reason)`` of those that stay in floating
    point; rescaled: ``(layer, channels)`` where a bias did not fit, so that the channels' weight scale was raised."""

    rounded: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]
    rescaled: tuple[tuple[str, int], ...]


@torch.inference_mode(False)
@torch.no_grad()
def quantize_biases(folded: nn.Module, bits: int = 32) -> BiasReport:
    """Round every bias to the grid ``s_in * s_w`` with signed codes of ``bits`` bits (8 to 32); in place.

    s_in is the scale of the quantizer that the layer's input comes from, s_w the weight scale of the channel. Where
    |bias| exceeds the grid, or leaves the target's int32 sum no room for the largest sum of products of codes, or
    s_in * s_w is too small for float32, the weight scale of that channel is raised until it fits and its codes are
    rounded again.
    """
    if parts := parts_of(folded):
        found = {part: quantize_biases(network, bits) for part, network in parts.items()}
        return BiasReport(
            tuple(named(part, name) for part, report in found.items() for name in report.rounded),
            tuple((named(part, name), why) for part, report in found.items() for name, why in report.kept),
            tuple((named(part, name), count) for part, report in found.items() for name, count in report.rescaled),
        )
    if not isinstance(folded, fx.GraphModule):
        raise UserError("quantize_biases: expected a network that fold_batch_norms() or load_folded() returned.")
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in folded.graph.nodes:
        if is_layer(node):
            calls[node.target].append(node)
    rounded, kept, rescaled = [], [], []
    for name, nodes in calls.items():
        layer: Any = folded.get_submodule(name)
        if layer.bias is None:
            continue
        quantizers = [input_quantizer(node) for node in nodes]
        if any(q is not None and not q.has_range for q in quantizers):
            raise UserError("quantize_biases: the activations have no ranges yet; run calibrate(sim, loader) first.")
        steps = {None if q is None else float(positive(q.scale)) for q in quantizers}
        step = steps.pop()
        if steps:
            kept.append((name, "called with inputs of different scales"))
        elif step is None:
            kept.append((name, "its input is not quantized"))
        elif not parametrize.is_parametrized(layer, "weight"):
            kept.append((name, "its weight is not quantized"))
        else:
            channels = _round_bias(layer, step, bits, max(_largest_code(q) for q in quantizers if q is not None))
            rounded.append(name)
            rescaled += [(name, channels)] if channels else []
    return BiasReport(tuple(rounded), tuple(kept), tuple(rescaled))


def _largest_code(quantizer: ActivationQuantizer) -> int:
    """The largest magnitude of ``code - zero_point``."""
    zero_point = int(quantizer.grid_zero_point().detach().round())
    return max(zero_point, quantizer.quant_max - zero_point)


def _round_bias(layer: Any, input_scale: float, bits: int, largest_input: int) -> int:
    """Returns how many channels had to be rescaled. largest_input: the largest magnitude of an input's code."""
    dequantize: Dequantize = layer.parametrizations.weight[0]
    bias: Tensor = layer.bias.detach().double()
    largest = 2 ** (bits - 1) - 1
    weight_codes = dequantize.layout.rows(layer.parametrizations.weight.original.double())
    sums = weight_codes.abs().sum(dim=1) * largest_input  # the largest that the products can add up to
    # Sums of wide codes, which int32 cannot hold even without a bias, are the target's own affair.
    room = torch.where(sums < 2**31 - 2**24, 2**31 - 1 - sums, float(largest)).clamp(max=largest)
    needed = torch.maximum(bias.abs() / room, torch.full_like(bias, SMALLEST_STEP)) / input_scale
    needed = needed if dequantize.per_channel else needed.amax(dim=0, keepdim=True)
    channels = _raise_scale(layer, dequantize, needed)
    step = (input_scale * dequantize.scale.double()).to(dequantize.scale.dtype)
    codes = (bias / step.double()).round().clamp(-largest, largest).to(torch.int32)
    del layer.bias
    scale = step if dequantize.per_channel else step.expand(codes.numel()).clone()
    set_codes(layer, "bias", codes, Dequantize(bits, 1, False, 1, 1, scale, dtype=dequantize.dtype))
    return channels


def _raise_scale(layer: Any, dequantize: Dequantize, needed: Tensor) -> int:
    scale = dequantize.scale
    too_small = scale.double() < needed
    if not bool(too_small.any()):
        return 0
    raised = torch.where(too_small, (needed * (1 + 1e-6)).to(scale.dtype), scale)
    codes: Tensor = layer.parametrizations.weight.original
    ratio = dequantize.layout.expand(scale.double() / raised.double())
    codes.copy_((codes.double() * ratio).round().to(codes.dtype))
    dequantize.scale = raised
    return int(too_small.sum())
