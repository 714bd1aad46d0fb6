"""Folding of an ONNX model's batch norms into the layers before them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import helper

from bnre_exp.algorithms.bias import SMALLEST_STEP
from bnre_exp.algorithms.fold import SMALLEST_SCALE
from bnre_exp.errors import UserError
from bnre_exp.onnx.constants import (
    ONNX,
    attribute,
    bn_name,
    computed_constants,
    inner_batch_norms,
    is_batch_norm,
    why_not_in_inference,
)
from bnre_exp.onnx.graph import EditedGraph, Kept, Quantized, drop_unused, edited_graph, ranks_of
from bnre_exp.onnx_io.names import unique
from bnre_exp.quantsim.quantizers.layout import WeightLayout

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
DEFAULT_EPSILON = 1e-5  # of BatchNormalization


@dataclass(frozen=True)
class OnnxFoldReport:
    """What became of every BatchNormalization.

    folded: ``(layer's node, batch norm)``; kept: ``(batch norm, reason)``; notes: ``(layer's node, what changed)``.
    """

    folded: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]


def fold_batch_norms(model: onnx.ModelProto) -> tuple[onnx.ModelProto, OnnxFoldReport]:
    """Return a copy of an ONNX model with its batch norms in the layers before them, and a report.

    A floating-point weight is multiplied by gamma / sigma. Of a quantized one (DequantizeLinear) the scale is, which
    then is one per channel, and the codes change at most their sign, so that nothing is rounded anew but the bias:
    where weight and input are quantized it becomes int32 at the product of their scales, as integer runtimes need it.
    What cannot be folded exactly stays, and is named. The model itself is unchanged.

    Raises ``UserError`` if the model has no batch norm.
    """
    folded = copy.deepcopy(model)
    bns, inner = [node for node in folded.graph.node if is_batch_norm(node)], inner_batch_norms(folded)
    if not bns and not inner:
        raise UserError("The model has no BatchNormalization operation: it is folded already, or never had one.")
    folded.ir_version = max(folded.ir_version, 4)  # before, every initializer was an input
    pairs: list[tuple[str, str]] = []
    kept = [(bn_name(node), f"it {reason}") for node, reason in inner]
    ranks, computed = ranks_of(folded), computed_constants(folded)
    notes: list[tuple[str, str]] = []
    for bn in bns:
        graph = edited_graph(folded, ranks, computed, notes)
        label = bn_name(bn)
        try:
            layer = _layer_before(graph, bn)
            name = _name(layer)
            with np.errstate(all="ignore"):
                _fold(graph, layer, bn)
        except Kept as reason:
            kept.append((label, str(reason)))
        else:
            pairs.append((name, label))
    drop_unused(folded.graph)
    return folded, OnnxFoldReport(tuple(pairs), tuple(kept), tuple(notes))


def _name(layer: onnx.NodeProto) -> str:
    return str(layer.name or layer.output[0])


def _layer_before(graph: EditedGraph, bn: onnx.NodeProto) -> onnx.NodeProto:
    reason = why_not_in_inference(bn)
    if reason is not None:
        raise Kept(f"it {reason}")
    source = graph.makers.get(bn.input[0])
    if source is None:
        raise Kept("it reads an input of the model")
    if source.op_type == "DequantizeLinear":
        raise Kept("a quantizer between the layer and the batch norm")
    if source.op_type == "Add" and graph.ranks.get(bn.input[0]) == 2:
        products = [graph.makers.get(name) for name in source.input]
        if any(node is not None and node.op_type == "MatMul" for node in products):
            raise Kept("a MatMul whose bias is added by an operation of its own (onnxoptimizer makes a Gemm of them)")
    if source.op_type not in LAYERS or source.domain not in ONNX:
        raise Kept(f"no convolution or Gemm directly before it, but a {source.op_type}")
    readers = {id(node) for node, _ in graph.constants.readers[bn.input[0]]}
    if len(readers) > 1 or bn.input[0] in graph.outputs:
        raise Kept("the layer's output has another consumer")
    if source.op_type == "MatMul" and graph.ranks.get(bn.input[0]) != 2:
        raise Kept("a MatMul whose channels are not, or not known to be, on the axis that is normalized")
    return source


def _fold(graph: EditedGraph, layer: onnx.NodeProto, bn: onnx.NodeProto) -> None:
    gamma, beta, mean, var = _parameters(graph, bn)
    gain = gamma / np.sqrt(var + attribute(bn, "epsilon", DEFAULT_EPSILON))
    shift = beta - mean * gain
    weight = graph.quantized(layer.input[1])
    codes = weight.codes if weight is not None else graph.constants.value(layer.input[1])
    if codes is None:
        raise Kept(f"the weight of the {layer.op_type} is not a constant")
    layout, axis = _layout(layer, codes.shape)
    channels = codes.shape[1] * layout.groups if layout.transposed else codes.shape[axis or 0]
    if any(len(values) != channels for values in (gamma, beta, mean, var)):
        raise Kept("its parameters do not fit the layer's channels")
    factor = layout.expand(torch.from_numpy(gain)).numpy() if axis is None else _along(gain, codes.ndim, axis)
    if layer.op_type == "Gemm":
        shift = shift / (attribute(layer, "beta", 1.0) or 1.0)
    bias = _old_bias(graph, layer, len(gain)) * gain + shift
    name = str(bn.output[0])
    dtype = codes.dtype if weight is None else weight.scale.dtype
    _check_finite(gain, bias.astype(dtype))
    if weight is None:
        values = (codes.astype(np.float64) * factor).astype(codes.dtype)
        _check_finite(values)
        new_weight, step = graph.add_constant(f"{name}_weight", values), None
    else:
        new_weight, scale = _fold_codes(graph, layer, name, weight, gain, factor, axis)
        step = _bias_step(graph, layer, scale) if dtype == np.float32 else None
    # Nothing can fail from here on.
    new_bias = _new_bias(graph, layer, name, bias, step, dtype)
    layer.input[1] = new_weight
    _set_output(graph, layer, bn, new_bias)


def _check_finite(*values: np.ndarray) -> None:
    if not all(np.isfinite(x.astype(np.float64)).all() for x in values):
        raise Kept("folding would give numbers that are not finite, or that the layer's type does not hold")


def _parameters(graph: EditedGraph, bn: onnx.NodeProto) -> list[np.ndarray]:
    found = []
    for name in bn.input[1:5]:
        value = graph.constants.value(name)
        behind = graph.quantized(name) if value is None else None
        if behind is not None:
            value = _dequantized(behind)
        if value is None:
            raise Kept("its parameters are not constants")
        found.append(value.astype(np.float64).ravel())
    return found


def _dequantized(tensor: Quantized) -> np.ndarray:
    scale, zero = (
        value if value.size == 1 else _along(value, tensor.codes.ndim, tensor.axis)
        for value in (tensor.scale, tensor.zero_point)
    )
    values: np.ndarray = (tensor.codes.astype(np.float64) - zero.astype(np.float64)) * scale.astype(np.float64)
    return values


def _along(values: np.ndarray, ndim: int, axis: int) -> np.ndarray:
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def _layout(layer: onnx.NodeProto, shape: tuple[int, ...]) -> tuple[WeightLayout, int | None]:
    """Where a weight's output channels are; the axis is None for a grouped transposed convolution, which has two."""
    groups = int(attribute(layer, "group", 1))
    if len(shape) < 2 or (layer.op_type in ("Gemm", "MatMul") and len(shape) != 2):
        raise Kept(f"the weight of the {layer.op_type} has {len(shape)} axes")
    if layer.op_type == "ConvTranspose":
        layout = WeightLayout(len(shape), True, groups, shape[0])
        return layout, 1 if groups == 1 else None
    if layer.op_type == "Conv":
        return WeightLayout(len(shape), False, groups, shape[1] * groups), 0
    is_transposed = layer.op_type == "Gemm" and attribute(layer, "transB", 0)
    return WeightLayout(2, False, 1, shape[1]), 0 if is_transposed else 1


def _old_bias(graph: EditedGraph, layer: onnx.NodeProto, channels: int) -> np.ndarray:
    """The bias per channel, float64 ``[C]``."""
    if layer.op_type == "MatMul" or len(layer.input) < 3 or not layer.input[2]:
        return np.zeros(channels)
    value = graph.constants.value(layer.input[2])
    behind = graph.quantized(layer.input[2]) if value is None else None
    if behind is not None:
        value = _dequantized(behind)
    fits = value is not None and (value.size == 1 or value.shape in ((channels,), (1, channels)))
    if value is None or not fits:
        raise Kept(f"the bias of the {layer.op_type} is not a constant, or not one per channel")
    used = attribute(layer, "beta", 1.0) != 0 or layer.op_type != "Gemm"
    return np.broadcast_to(value.astype(np.float64).ravel(), channels) * float(used)


def _fold_codes(
    graph: EditedGraph, layer: onnx.NodeProto, name: str, weight: Quantized, gain: np.ndarray, factor: np.ndarray,
    axis: int | None,
) -> tuple[str, np.ndarray]:  # fmt: skip
    """New codes and scales behind a new DequantizeLinear; returns its output and the scale per channel."""
    if axis is None:
        raise Kept("a grouped transposed convolution needs a scale per group and channel, ONNX has one axis")
    if weight.scale.size > 1 and weight.axis != axis:
        raise Kept("its weight has scales along another axis than the output channels")
    if graph.opset < 13:
        raise Kept(f"opset {graph.opset} has no scales per channel; 13 has")
    zero = weight.zero_point.astype(np.int64)
    zeros = zero if zero.size == 1 else _along(zero, weight.codes.ndim, axis)
    scale = np.broadcast_to(weight.scale.astype(np.float64).ravel(), gain.shape)
    new_scale = (scale * np.abs(gain)).astype(weight.scale.dtype)
    _check_finite(new_scale)
    vanishes = new_scale < SMALLEST_SCALE
    sign = np.where(_along(vanishes, factor.ndim, axis), 0, np.sign(factor))
    codes = (weight.codes.astype(np.int64) - zeros) * sign.astype(np.int64) + zeros
    low, high = _limits(graph, weight)
    if codes.min(initial=0) < low or codes.max(initial=0) > high:
        raise Kept(f"a negative gamma meets the code {low}, whose negative the type does not have")
    new_scale = np.where(vanishes, scale, new_scale).astype(weight.scale.dtype)
    zero_point = np.broadcast_to(weight.zero_point.ravel(), gain.shape).copy()
    inputs = [
        graph.add_constant(f"{name}_codes", codes.astype(weight.codes.dtype)),
        graph.add_constant(f"{name}_scale", new_scale),
        graph.add_constant(f"{name}_zero_point", zero_point),
    ]
    output = unique(f"{name}_weight", graph.taken)
    label = unique(f"{name}_dequantize", graph.taken)
    graph.add_node(helper.make_node("DequantizeLinear", inputs, [output], name=label, axis=axis), layer)
    if weight.scale.size == 1 and len(gain) > 1:
        graph.notes.append((_name(layer), "its weight has a scale per channel now"))
    return output, new_scale.astype(np.float64)


def _limits(graph: EditedGraph, weight: Quantized) -> tuple[int, int]:
    """The range of the type of the codes, 4-bit ones included."""
    kind = int(graph.constants.tensors[weight.node.input[0]].data_type)
    bits = {int(onnx.TensorProto.INT4): (-8, 7), int(onnx.TensorProto.UINT4): (0, 15)}
    if kind in bits:
        return bits[kind]
    info = np.iinfo(weight.codes.dtype)
    return int(info.min), int(info.max)


def _bias_step(graph: EditedGraph, layer: onnx.NodeProto, scale: np.ndarray) -> np.ndarray | None:
    """The grid of an int32 bias per channel, None if the input is not quantized with one known scale."""
    source = graph.makers.get(layer.input[0])
    if source is None or source.op_type != "DequantizeLinear" or len(layer.input) < 2 or layer.op_type == "MatMul":
        return None
    if attribute(layer, "alpha", 1.0) != 1.0 or attribute(layer, "beta", 1.0) != 1.0:
        return None
    input_scale = graph.constants.value(source.input[1])
    if input_scale is None or input_scale.size != 1:
        return None
    return (float(input_scale.ravel()[0]) * scale).astype(np.float32)


def _new_bias(
    graph: EditedGraph, layer: onnx.NodeProto, name: str, bias: np.ndarray, step: np.ndarray | None, dtype: np.dtype
) -> str:
    """A tensor that is the bias: a constant, or int32 codes and a DequantizeLinear."""
    if step is not None:
        largest = np.abs(bias / np.maximum(step, SMALLEST_STEP)).max(initial=0)
        if largest > 2**31 - 1 or step.min(initial=1) < SMALLEST_STEP:
            reason = "its bias does not fit int32 at the product of the scales; it stays in floating point"
            graph.notes.append((_name(layer), reason))
            step = None
    if step is None:
        return graph.add_constant(f"{name}_bias", bias.astype(dtype))
    inputs = [
        graph.add_constant(f"{name}_bias_codes", np.rint(bias / step.astype(np.float64)).astype(np.int32)),
        graph.add_constant(f"{name}_bias_scale", step),
        graph.add_constant(f"{name}_bias_zero_point", np.zeros(len(bias), np.int32)),
    ]
    output, label = unique(f"{name}_bias", graph.taken), unique(f"{name}_bias_dequantize", graph.taken)
    graph.add_node(helper.make_node("DequantizeLinear", inputs, [output], name=label, axis=0), layer)
    return output


def _set_output(graph: EditedGraph, layer: onnx.NodeProto, bn: onnx.NodeProto, bias: str) -> None:
    """The layer gives what the batch norm gave, which goes."""
    position = next(i for i, node in enumerate(graph.graph.node) if node is bn)
    if layer.op_type == "MatMul":
        graph.graph.node.insert(position, helper.make_node("Add", [layer.output[0], bias], [bn.output[0]]))
    else:
        if len(layer.input) > 2:
            layer.input[2] = bias
        else:
            layer.input.append(bias)
        layer.output[0] = bn.output[0]
        for item in layer.attribute:
            if layer.op_type == "Gemm" and item.name == "beta" and item.f == 0:
                item.f = 1.0
    graph.graph.node.remove(bn)
