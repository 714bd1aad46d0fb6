"""Pooling as runtimes have integer kernels for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnre_exp.onnx_io.opset import replace_node


def pad_before_pooling(graph: Any) -> None:
    """Average pooling that rounds its output size up, with padding that counts, as padding and then pooling that does
    not count it: ONNX Runtime's integer kernel divides wrongly otherwise."""
    import onnx_ir as ir

    for node in list(graph):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        counts = attributes.get("count_include_pad", 0) and attributes.get("ceil_mode", 0)
        if node.op_type != "AveragePool" or node.domain != "" or not counts:
            continue
        pads = list(attributes.get("pads", []))
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
        if not any(pads):
            continue
        half = len(pads) // 2
        amounts = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
        name = f"{node.outputs[0].name}_pads"
        value = ir.Value(name=name, const_value=ir.tensor(amounts, name=name))
        graph.register_initializer(value)
        padded = ir.node("Pad", [node.inputs[0], value])
        graph.insert_before(node, padded)
        node.replace_input_with(0, padded.outputs[0])
        node.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))


def pool_globally(graph: Any) -> None:
    """A mean over height and width as the pooling that it is, for which runtimes have integer kernels."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "ReduceMean" or node.domain != "" or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        axes, shape = ir.convenience.get_const_tensor(node.inputs[1]), node.inputs[0].shape
        keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        if axes is None or shape is None or not keeps or len(shape) < 3:
            continue
        if sorted(int(axis) % len(shape) for axis in axes.numpy().ravel()) == list(range(2, len(shape))):
            replace_node(graph, node, [ir.node("GlobalAveragePool", [node.inputs[0]])])
