"""An ONNX graph while batch norms are folded in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from bnre_exp.onnx_io.names import unique
from bnre_exp.onnx_io.proto import Node, Value, constant


class Kept(Exception):
    """Why a batch norm stays."""


@dataclass
class Quantized:
    """A tensor that a DequantizeLinear gives: codes, scale and zero point, and the axis of the scale."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int


@dataclass
class EditedGraph:
    """A graph being changed: its opset, how many axes its tensors have, names in use, the notes for the report."""

    graph: ir.Graph
    opset: int
    ranks: dict[str, int]
    taken: set[str]
    notes: list[tuple[str, str]]

    def add_constant(self, name: str, values: np.ndarray) -> Value:
        """A new initializer."""
        tensor = ir.tensor(values, name=unique(name, self.taken))
        value = ir.val(tensor.name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def dequantize(self, name: str, values: Quantized, part: str, before: Node) -> Value:
        """The tensor that a new DequantizeLinear, right before a node, makes of these values."""
        inputs = [
            self.add_constant(f"{name}{part}_codes", values.codes),
            self.add_constant(f"{name}{part}_scale", values.scale),
            self.add_constant(f"{name}{part}_zero_point", values.zero_point),
        ]
        label = unique(f"{name}{part}_dequantize", self.taken)
        node = ir.node("DequantizeLinear", inputs, {"axis": values.axis}, name=label)
        node.outputs[0].name = unique(f"{name}{part or '_weight'}", self.taken)
        self.graph.insert_before(before, node)
        return node.outputs[0]


def quantized(value: Value | None) -> Quantized | None:
    """The codes behind a tensor, if a DequantizeLinear of constants gives it."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    if node.domain != "":
        raise Kept(f"its weight is dequantized by an operation of {node.domain}")
    known = [constant(item) for item in node.inputs if item is not None]
    values = [item for item in known if item is not None]
    if len(values) < len(known) or node.attributes.get_int("block_size", 0):
        raise Kept("its weight is dequantized in blocks, or from codes that are not constants")
    codes, scale, *zero = values
    if codes.dtype.kind not in "iu" and "int" not in codes.dtype.name:
        raise Kept(f"the codes of its weight are of type {codes.dtype}")
    zero_point = zero[0] if zero else np.zeros(scale.shape, codes.dtype)
    return Quantized(codes, scale, zero_point, node.attributes.get_int("axis", 1) % max(1, codes.ndim))


def ranks_of(model: onnx.ModelProto) -> dict[str, int]:
    """How many axes each tensor has, where that is known."""
    try:
        known = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # shapes decide about MatMul only
        known = model.graph
    infos = [*known.value_info, *known.input, *known.output]
    return {i.name: len(i.type.tensor_type.shape.dim) for i in infos if i.type.tensor_type.HasField("shape")}
