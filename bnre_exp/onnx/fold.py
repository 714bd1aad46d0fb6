"""Folding of an ONNX model's batch norms into the layers before them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch

from bnre_exp.algorithms.bias import SMALLEST_STEP
from bnre_exp.algorithms.fold import SMALLEST_SCALE
from bnre_exp.errors import UserError
from bnre_exp.onnx.constants import (
    LAYERS,
    bn_name,
    check_values,
    find_computed_constants,
    inner_batch_norms,
    is_batch_norm,
    node_name,
    why_not_in_inference,
)
from bnre_exp.onnx.graph import EditedGraph, Kept, Quantized, quantized, ranks_of
from bnre_exp.onnx_io.bounds import check_bounds
from bnre_exp.onnx_io.names import names_of
from bnre_exp.onnx_io.opset import drop_unused, give_instead, replace_node
from bnre_exp.onnx_io.proto import Node, Value, constant, from_proto, to_proto
from bnre_exp.quantsim.quantizers.layout import WeightLayout

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

    Raises ``UserError`` if the model has no batch norm, constants that are not finite or a negative variance, or asks
    for more memory or time than a network needs.
    """
    check_bounds(model)
    folded = from_proto(model)
    bns, inner = [node for node in folded.graph if is_batch_norm(node)], inner_batch_norms(folded)
    if not bns and not inner:
        raise UserError("The model has no BatchNormalization operation: it is folded already, or never had one.")
    folded.ir_version = max(folded.ir_version, 4)  # before, every initializer was an input
    find_computed_constants(folded)
    check_values(folded, with_statistics=True)
    opset = folded.opset_imports.get("", 1)
    graph = EditedGraph(folded.graph, opset, ranks_of(model), names_of(folded.graph), [])
    pairs: list[tuple[str, str]] = []
    kept = [(bn_name(node), f"it {reason}") for node, reason in inner]
    for bn in bns:
        label = bn_name(bn)
        try:
            layer = _layer_before(graph, bn)
            name = node_name(layer)
            with np.errstate(all="ignore"):
                _fold(graph, layer, bn)
        except Kept as reason:
            kept.append((label, str(reason)))
        else:
            pairs.append((name, label))
    drop_unused(folded.graph)
    return to_proto(folded, model), OnnxFoldReport(tuple(pairs), tuple(kept), tuple(graph.notes))


def _layer_before(graph: EditedGraph, bn: Node) -> Node:
    reason = why_not_in_inference(bn)
    if reason is not None:
        raise Kept(f"it {reason}")
    x = bn.inputs[0]
    source = x.producer()
    if source is None:
        raise Kept("it reads an input of the model")
    if source.op_type == "DequantizeLinear":
        raise Kept("a quantizer between the layer and the batch norm")
    is_sum = source.op_type == "Add" and graph.ranks.get(x.name) == 2
    if is_sum and any(_is_made_by(value, "MatMul") for value in source.inputs):
        raise Kept("a MatMul whose bias is added by an operation of its own (onnxoptimizer makes a Gemm of them)")
    if source.op_type not in LAYERS or source.domain != "":
        raise Kept(f"no convolution or Gemm directly before it, but a {source.op_type}")
    if len(x.consumers()) > 1 or x.is_graph_output():
        raise Kept("the layer's output has another consumer")
    if source.op_type == "MatMul" and graph.ranks.get(x.name) != 2:
        raise Kept("a MatMul whose channels are not, or not known to be, on the axis that is normalized")
    return source


def _fold(graph: EditedGraph, layer: Node, bn: Node) -> None:
    gamma, beta, mean, var = _parameters(bn)
    gain = gamma / np.sqrt(var + bn.attributes.get_float("epsilon", DEFAULT_EPSILON))
    shift = beta - mean * gain
    weight = quantized(layer.inputs[1])
    codes = weight.codes if weight is not None else constant(layer.inputs[1])
    if codes is None:
        raise Kept(f"the weight of the {layer.op_type} is not a constant")
    layout, axis = _layout(layer, codes.shape)
    channels = codes.shape[1] * layout.groups if layout.transposed else codes.shape[axis or 0]
    if any(len(values) != channels for values in (gamma, beta, mean, var)):
        raise Kept("its parameters do not fit the layer's channels")
    factor = layout.expand(torch.from_numpy(gain)).numpy() if axis is None else _along(gain, codes.ndim, axis)
    if layer.op_type == "Gemm":
        shift = shift / (layer.attributes.get_float("beta", 1.0) or 1.0)
    bias = _old_bias(layer, len(gain)) * gain + shift
    name = str(bn.outputs[0].name)
    dtype = codes.dtype if weight is None else weight.scale.dtype
    _check_finite(gain, bias.astype(dtype))
    if weight is None:
        values = (codes.astype(np.float64) * factor).astype(codes.dtype)
        _check_finite(values)
        new_weight, step = graph.add_constant(f"{name}_weight", values), None
    else:
        new = _fold_codes(graph, weight, gain, factor, axis)
        if new.scale.size > weight.scale.size:
            graph.notes.append((node_name(layer), "its weight has a scale per channel now"))
        new_weight = graph.dequantize(name, new, "", layer)
        step = _bias_step(layer, new.scale.astype(np.float64)) if dtype == np.float32 else None
    # Nothing can fail from here on.
    new_bias = _new_bias(graph, layer, name, bias, step, dtype)
    layer.replace_input_with(1, new_weight)
    _set_output(graph.graph, layer, bn, new_bias)


def _check_finite(*values: np.ndarray) -> None:
    if not all(np.isfinite(x.astype(np.float64)).all() for x in values):
        raise Kept("folding would give numbers that are not finite, or that the layer's type does not hold")


def _parameters(bn: Node) -> list[np.ndarray]:
    found = []
    for parameter in bn.inputs[1:]:
        value = _values(parameter)
        if value is None:
            raise Kept("its parameters are not constants")
        found.append(value.astype(np.float64).ravel())
    return found


def _values(value: Value | None) -> np.ndarray | None:
    """The values of a constant, or of codes that are."""
    known = constant(value)
    if known is not None or (tensor := quantized(value)) is None:
        return known
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


def _layout(layer: Node, shape: tuple[int, ...]) -> tuple[WeightLayout, int | None]:
    """Where a weight's output channels are; the axis is None for a grouped transposed convolution, which has two."""
    groups = layer.attributes.get_int("group", 1)
    if len(shape) < 2 or (layer.op_type in ("Gemm", "MatMul") and len(shape) != 2):
        raise Kept(f"the weight of the {layer.op_type} has {len(shape)} axes")
    if layer.op_type == "ConvTranspose":
        layout = WeightLayout(len(shape), True, groups, shape[0])
        return layout, 1 if groups == 1 else None
    if layer.op_type == "Conv":
        return WeightLayout(len(shape), False, groups, shape[1] * groups), 0
    is_transposed = layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0)
    return WeightLayout(2, False, 1, shape[1]), 0 if is_transposed else 1


def _old_bias(layer: Node, channels: int) -> np.ndarray:
    """The bias per channel, float64 ``[C]``."""
    if layer.op_type == "MatMul" or len(layer.inputs) < 3 or layer.inputs[2] is None:
        return np.zeros(channels)
    value = _values(layer.inputs[2])
    fits = value is not None and (value.size == 1 or value.shape in ((channels,), (1, channels)))
    if value is None or not fits:
        raise Kept(f"the bias of the {layer.op_type} is not a constant, or not one per channel")
    used = layer.attributes.get_float("beta", 1.0) != 0 or layer.op_type != "Gemm"
    return np.broadcast_to(value.astype(np.float64).ravel(), channels) * float(used)


def _fold_codes(
    graph: EditedGraph, weight: Quantized, gain: np.ndarray, factor: np.ndarray, axis: int | None
) -> Quantized:
    """New codes, with a scale per channel."""
    if axis is None:
        raise Kept("a grouped transposed convolution needs a scale per group and channel, ONNX has one axis")
    if weight.scale.size > 1 and weight.axis != axis:
        raise Kept("its weight has scales along another axis than the output channels")
    if graph.opset < 13:
        raise Kept(f"opset {graph.opset} has no scales per channel; 13 has")
    zero = weight.zero_point.astype(np.int64)
    zeros = zero if zero.size == 1 else _along(zero, weight.codes.ndim, axis)
    scale = np.broadcast_to(weight.scale.astype(np.float64).ravel(), gain.shape)
    exact = scale * np.abs(gain)
    new_scale = exact.astype(weight.scale.dtype)
    _check_finite(new_scale)
    if weight.scale.dtype == np.float16 and ((exact > SMALLEST_SCALE) & (exact < np.finfo(np.float16).tiny)).any():
        raise Kept("a scale would be too small for float16 to hold with full precision")
    vanishes = new_scale < SMALLEST_SCALE
    sign = np.where(_along(vanishes, factor.ndim, axis), 0, np.sign(factor))
    codes = (weight.codes.astype(np.int64) - zeros) * sign.astype(np.int64) + zeros
    low, high = _limits(weight.codes.dtype)
    if codes.min(initial=0) < low or codes.max(initial=0) > high:
        raise Kept(f"a negative gamma meets the code {low}, whose negative the type does not have")
    new_scale = np.where(vanishes, scale, new_scale).astype(weight.scale.dtype)
    zero_point = np.broadcast_to(weight.zero_point.ravel(), gain.shape).copy()
    return Quantized(codes.astype(weight.codes.dtype), new_scale, zero_point, axis)


def _limits(kind: np.dtype) -> tuple[int, int]:
    """The range of a type of integers, 4-bit ones included."""
    dtype = ir.DataType.from_numpy(kind)
    half = 2 ** (dtype.bitwidth - 1)
    return (-half, half - 1) if dtype.is_signed() else (0, 2 * half - 1)


def _bias_step(layer: Node, scale: np.ndarray) -> np.ndarray | None:
    """The grid of an int32 bias per channel, None if the input is not quantized with one known scale."""
    if layer.op_type == "MatMul" or not _is_made_by(layer.inputs[0], "DequantizeLinear"):
        return None
    if any(layer.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return None
    input_scale = constant(layer.inputs[0].producer().inputs[1])
    if input_scale is None or input_scale.size != 1:
        return None
    return (float(input_scale.ravel()[0]) * scale).astype(np.float32)


def _new_bias(
    graph: EditedGraph, layer: Node, name: str, bias: np.ndarray, step: np.ndarray | None, dtype: np.dtype
) -> Value:
    """A tensor that is the bias: a constant, or int32 codes and a DequantizeLinear."""
    if step is not None:
        largest = np.abs(bias / np.maximum(step, SMALLEST_STEP)).max(initial=0)
        if largest > 2**31 - 1 or step.min(initial=1) < SMALLEST_STEP:
            reason = "its bias does not fit int32 at the product of the scales; it stays in floating point"
            graph.notes.append((node_name(layer), reason))
            step = None
    if step is None:
        return graph.add_constant(f"{name}_bias", bias.astype(dtype))
    codes = np.rint(bias / step.astype(np.float64)).astype(np.int32)
    return graph.dequantize(name, Quantized(codes, step, np.zeros(len(bias), np.int32), 0), "_bias", layer)


def _set_output(graph: ir.Graph, layer: Node, bn: Node, bias: Value) -> None:
    """The layer gives what the batch norm gave, which goes."""
    if layer.op_type == "MatMul":
        replace_node(graph, bn, [ir.node("Add", [layer.outputs[0], bias])])
        return
    layer.resize_inputs(3)
    layer.replace_input_with(2, bias)
    if layer.op_type == "Gemm" and layer.attributes.get_float("beta", 1.0) == 0:
        del layer.attributes["beta"]
    give_instead(graph, bn, layer.outputs[0])


def _is_made_by(value: Value | None, kind: str) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == kind
