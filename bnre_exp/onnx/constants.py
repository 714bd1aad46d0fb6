"""Constants of an ONNX graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from bnre_exp.onnx_io.names import all_nodes

ONNX = ("", "ai.onnx")  # how the domain of ONNX's own operations is written
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


@dataclass
class Constants:
    """Tensors of a graph that are known: initializers, and outputs of Constant nodes; and who reads which tensor."""

    tensors: dict[str, onnx.TensorProto]
    readers: dict[str, list[tuple[onnx.NodeProto, int]]]

    def value(self, name: str) -> np.ndarray | None:
        """The values, None if they are not known."""
        return numpy_helper.to_array(self.tensors[name]) if name in self.tensors else None


def constants_of(graph: onnx.GraphProto) -> Constants:
    """The constants of the graph itself; those of bodies of If and Loop count as read, not as known."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in all_nodes(graph):
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, index))
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ONNX:
            for attribute in node.attribute:
                if attribute.name == "value":
                    tensors[node.output[0]] = attribute.t
    return Constants(tensors, readers)


def computed_constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Tensors that the graph computes from constants alone, but for what quantizers give; the model is unchanged."""
    import onnx_ir as ir
    from onnxscript import optimizer

    copied = ir.from_proto(model)
    known = set(copied.graph.initializers)
    try:
        optimizer.fold_constants(copied, should_fold=lambda node: False if node.op_type in QUANTIZERS else None)
    except Exception:  # whatever it cannot evaluate stays unknown
        return {}
    found = {name: value.const_value for name, value in copied.graph.initializers.items() if name not in known}
    return {name: ir.to_proto(tensor) for name, tensor in found.items() if tensor is not None}


def bn_name(node: onnx.NodeProto) -> str:
    """What to call a batch norm: the module it came from, where its parameters tell, else its node or output."""
    module, _, parameter = node.input[3].rpartition(".")
    if module and parameter in ("running_mean", "moving_mean", "mean"):
        return str(module)
    return str(node.name or node.output[0])


def is_batch_norm(node: onnx.NodeProto) -> bool:
    """Whether the node is ONNX's own BatchNormalization, with all its inputs."""
    return node.op_type == "BatchNormalization" and node.domain in ONNX and len(node.input) == 5


def inner_batch_norms(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, str]]:
    """Batch norms that are not in the graph itself, and where they are, in words."""
    own = {id(node) for node in model.graph.node}
    bodies = [node for node in all_nodes(model.graph) if id(node) not in own and is_batch_norm(node)]
    functions = [node for function in model.functions for node in function.node if is_batch_norm(node)]
    in_function = "is in a function of the model (onnx.inliner puts those in place)"
    return [(node, "is in the body of an If or Loop") for node in bodies] + [(node, in_function) for node in functions]


def why_not_in_inference(node: onnx.NodeProto) -> str | None:
    """Why a batch norm does not normalize by its statistics, channel by channel; None if it does."""
    if attribute(node, "training_mode", 0) or sum(map(bool, node.output)) > 1 or not attribute(node, "is_test", 1):
        return "is in training mode: it normalizes each batch by its own statistics"
    if not attribute(node, "spatial", 1):
        return "normalizes every position by statistics of its own (spatial=0)"
    return None


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operations that a model uses."""
    return max((item.version for item in model.opset_import if item.domain in ONNX), default=1)


def attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    """A number among a node's attributes."""
    for item in node.attribute:
        if item.name == name:
            return float(onnx.helper.get_attribute_value(item))
    return default
