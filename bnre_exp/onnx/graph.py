"""An ONNX graph while batch norms are folded in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from bnre_exp.onnx.constants import ONNX, Constants, attribute, constants_of, opset_of
from bnre_exp.onnx_io.names import names_of, unique


class Kept(Exception):
    """Why a batch norm stays."""


@dataclass
class Quantized:
    """A tensor that a DequantizeLinear gives: codes, scale and zero point, the node, and the axis of the scale."""

    node: onnx.NodeProto
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int


@dataclass
class EditedGraph:
    """A graph being changed: its constants, who makes what, its opset, the notes for the report."""

    graph: onnx.GraphProto
    opset: int
    constants: Constants
    makers: dict[str, onnx.NodeProto]
    outputs: set[str]
    ranks: dict[str, int]
    taken: set[str]
    notes: list[tuple[str, str]]

    def add_constant(self, name: str, values: np.ndarray) -> str:
        """A new initializer; returns its name."""
        name = unique(name, self.taken)
        tensor = numpy_helper.from_array(values, name)
        self.graph.initializer.append(tensor)
        self.constants.tensors[name] = tensor
        return name

    def add_node(self, node: onnx.NodeProto, before: onnx.NodeProto) -> None:
        """Put a node right before another."""
        index = next(i for i, other in enumerate(self.graph.node) if other is before)
        self.graph.node.insert(index, node)
        self.makers.update({name: self.graph.node[index] for name in node.output})

    def quantized(self, name: str) -> Quantized | None:
        """The codes behind a tensor, if a DequantizeLinear of constants gives it."""
        node = self.makers.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        if node.domain not in ONNX:
            raise Kept(f"its weight is dequantized by an operation of {node.domain}")
        values = [value for item in node.input if item and (value := self.constants.value(item)) is not None]
        if len(values) < sum(map(bool, node.input)) or attribute(node, "block_size", 0):
            raise Kept("its weight is dequantized in blocks, or from codes that are not constants")
        codes, scale, *zero = values
        if codes.dtype.kind not in "iu" and "int" not in codes.dtype.name:
            raise Kept(f"the codes of its weight are of type {codes.dtype}")
        zero_point = zero[0] if zero else np.zeros(scale.shape, codes.dtype)
        return Quantized(node, codes, scale, zero_point, int(attribute(node, "axis", 1)) % max(1, codes.ndim))


def edited_graph(
    model: onnx.ModelProto,
    ranks: dict[str, int],
    computed: dict[str, onnx.TensorProto],
    notes: list[tuple[str, str]],
) -> EditedGraph:
    """A model's graph as it is now; ``computed``: further constants, ``ranks``: of its tensors."""
    graph, constants = model.graph, constants_of(model.graph)
    constants.tensors = {**computed, **constants.tensors}
    makers = {name: node for node in graph.node for name in node.output}
    outputs = {item.name for item in graph.output}
    return EditedGraph(graph, opset_of(model), constants, makers, outputs, ranks, names_of(graph), notes)


def ranks_of(model: onnx.ModelProto) -> dict[str, int]:
    """How many axes each tensor has, where that is known."""
    graph = model.graph
    try:
        known = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # shapes decide about MatMul only
        known = graph
    infos = [*known.value_info, *known.input, *known.output]
    return {i.name: len(i.type.tensor_type.shape.dim) for i in infos if i.type.tensor_type.HasField("shape")}


def drop_unused(graph: onnx.GraphProto) -> None:
    """Drop operations and initializers that nothing reads any more, and what was said about them; in place."""
    outputs = {item.name for item in graph.output}
    while True:
        read = set(constants_of(graph).readers) | outputs
        unread = [node for node in graph.node if not read & set(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    read = set(constants_of(graph).readers) | outputs
    dropped = {tensor.name for tensor in graph.initializer} - read
    for items in (graph.initializer, graph.input):
        for item in [item for item in items if item.name in dropped]:
            items.remove(item)
    for item in [item for item in graph.value_info if item.name not in read]:
        graph.value_info.remove(item)
    for note in [note for note in graph.quantization_annotation if note.tensor_name not in read]:
        graph.quantization_annotation.remove(note)
