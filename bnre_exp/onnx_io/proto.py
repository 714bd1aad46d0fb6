"""ONNX models as ``onnx_ir`` has them, where a tensor knows who makes and who reads it, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from bnre_exp.errors import UserError, first_line

Node = Any  # ir.Node; by its own annotations each of its inputs may be None and no attribute be a number
Value = Any  # ir.Value, likewise


def from_proto(model: onnx.ModelProto) -> ir.Model:
    """The model as ``onnx_ir.Model``, whose tensors are those of ``model``; ONNX's own domain is written in one way.

    Raises ``UserError`` if it is damaged.
    """
    try:
        converted = ir.from_proto(model)
    except Exception as error:  # onnx_ir has several kinds
        raise UserError(f"The ONNX model is not valid: {first_line(error.__cause__ or error)}") from error
    if "ai.onnx" in converted.opset_imports:
        converted.opset_imports[""] = converted.opset_imports.pop("ai.onnx")
    nodes = [*converted.graph.all_nodes(), *(node for function in converted.functions.values() for node in function)]
    given = [*_all_nodes(model.graph), *(node for function in model.functions for node in function.node)]
    for node, before in zip(nodes, given):  # those without a name got one, which nobody knows
        node.name = before.name or None
    return converted


def to_proto(model: ir.Model, original: onnx.ModelProto) -> onnx.ModelProto:
    """The model as ``onnx.ModelProto``, with what ``onnx_ir`` leaves out of the ``original``.

    Raises ``UserError`` if that is damaged in what ``onnx_ir`` does not look at before, such as names that are no text.
    """
    try:
        proto = ir.to_proto(model)
    except Exception as error:  # onnx_ir has several kinds
        raise UserError(f"The ONNX model is not valid: {first_line(error.__cause__ or error)}") from error
    proto.graph.sparse_initializer.extend(original.graph.sparse_initializer)
    proto.training_info.extend(original.training_info)
    return proto


def constant(value: Value | None) -> np.ndarray | None:
    """The values of a tensor, None if they are not known."""
    node = None if value is None or value.const_value is not None else value.producer()
    try:
        if node is not None and (node.domain, node.op_type, list(node.attributes)) == ("", "Constant", ["value"]):
            return node.attributes["value"].as_tensor().numpy()  # get_const_tensor would name it, in the model itself
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
    except (TypeError, ValueError):  # a Constant of another kind
        return None
    return None if tensor is None else tensor.numpy()


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.type in (5, 10) else []:
                yield from _all_nodes(inner)
