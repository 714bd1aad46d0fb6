"""An ONNX model at an older opset, for runtimes that know no newer one.

onnx's own converter goes down for few operations (there is none for Relu from 14 to 13); what the networks here are
made of mostly gained types and attributes since.
"""

from __future__ import annotations

from typing import Any

from bnre_exp.errors import UserError

REDUCTIONS = ("Max", "Min", "Mean", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")  # axes: an input since 18


def lower(model: Any, opset: int) -> None:
    """Bring an ``onnx_ir.Model`` down to ``opset``; in place. A model that is there already stays as it is.

    Raises ``UserError`` naming an operation that the opset does not have, or not with these attributes.
    """
    import onnx

    if opset >= model.opset_imports[""]:
        return
    for node in list(model.graph):
        if node.op_type == "Reshape" and "allowzero" in node.attributes and _is_without_effect(node, "allowzero"):
            del node.attributes["allowzero"]
        _spell_out(model.graph, node, opset)
    for node in model.graph:
        if node.domain == "":
            _fit(node, opset, model.opset_imports[""])
    drop_unused(model.graph)
    model.opset_imports[""] = opset
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def _spell_out(graph: Any, node: Any, opset: int) -> None:
    """What came later by what it is made of: HardSwish (14), and Shape of some axes (15)."""
    import numpy as np
    import onnx_ir as ir

    if node.domain != "":
        return
    if node.op_type == "HardSwish" and opset < 14:
        gate = ir.node("HardSigmoid", [node.inputs[0]], {"alpha": 1 / 6, "beta": 0.5})
        replace_node(graph, node, [gate, ir.node("Mul", [node.inputs[0], gate.outputs[0]])])
    elif node.op_type == "Shape" and opset < 15 and node.attributes:
        start, end = (node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end"))
        whole = ir.node("Shape", [node.inputs[0]])
        limits = [
            ir.node("Constant", [], {"value": ir.tensor(np.array([limit], np.int64))})
            for limit in (start or 0, np.iinfo(np.int64).max if end is None else end, 0)
        ]
        part = ir.node("Slice", [whole.outputs[0], *(limit.outputs[0] for limit in limits)])
        replace_node(graph, node, [whole, *limits, part])


def drop_unused(graph: Any) -> None:
    """Drop operations and initializers that nothing reads; in place."""
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
            if value.is_graph_input():  # as well, until IR version 4
                graph.inputs.remove(value)


def replace_node(graph: Any, node: Any, new: list[Any]) -> None:
    """Put nodes in place of one with one output, which the last of them gives under the same name."""
    graph.insert_before(node, new)
    give_instead(graph, node, new[-1].outputs[0])


def give_instead(graph: Any, node: Any, result: Any) -> None:
    """Drop a node with one output, whose readers get ``result`` under the same name."""
    import onnx_ir as ir

    old = node.outputs[0]
    name, result.shape, result.type = old.name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name


def _fit(node: Any, opset: int, present: int) -> None:
    """Make a node valid by the older definition of its operation."""
    import onnx
    import onnx_ir as ir

    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError as error:
        raise UserError(f"opset {opset} has no {node.op_type}; use a higher opset") from error
    newer = onnx.defs.get_schema(node.op_type, present, "")
    is_reduction = node.op_type.startswith("Reduce") and node.op_type.removeprefix("Reduce") in REDUCTIONS
    if is_reduction and opset < 18 <= present and len(node.inputs) > 1:
        axes = None if node.inputs[1] is None else ir.convenience.get_const_tensor(node.inputs[1])
        if axes is None and node.inputs[1] is not None:
            raise UserError(f"opset {opset} has no {node.op_type} over axes that are computed; use a higher opset")
        if axes is not None:
            node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.numpy().ravel()])
        node.resize_inputs(1)
    given = sum(value is not None for value in node.inputs)
    if len(node.inputs) > schema.max_input and given <= schema.max_input:
        node.resize_inputs(schema.max_input)
    for name in [name for name in node.attributes if name not in schema.attributes]:
        default = newer.attributes[name].default_value if name in newer.attributes else None
        is_default = default is not None and onnx.helper.get_attribute_value(default) == _plain_value(
            node.attributes[name]
        )
        if not is_default and not _is_without_effect(node, name):
            raise UserError(f"opset {opset} has no {node.op_type} with {name}; use a higher opset")
        del node.attributes[name]
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        raise UserError(f"opset {opset} has no {node.op_type} with {given} inputs; use a higher opset")


def _is_without_effect(node: Any, name: str) -> bool:
    """Reshape: allowzero matters only where the new shape has a zero. Split: num_outputs only where parts differ."""
    if node.op_type == "Reshape" and name == "allowzero":
        return not _may_be_zero(node.inputs[1])
    if node.op_type == "Split" and name == "num_outputs":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        size = None if node.inputs[0].shape is None else node.inputs[0].shape[axis]
        return len(node.inputs) == 1 and isinstance(size, int) and size % len(node.outputs) == 0
    return False


def _may_be_zero(shape: Any) -> bool:
    """Whether a zero is written into a shape; sizes of tensors that are not empty are none."""
    import onnx_ir as ir

    known = ir.convenience.get_const_tensor(shape)
    if known is not None:
        return 0 in known.numpy()
    node = shape.producer()
    if node is None:
        return True
    if node.op_type == "Concat":
        return any(_may_be_zero(part) for part in node.inputs)
    if node.op_type in ("Reshape", "Unsqueeze", "Squeeze", "Cast", "Identity"):
        return _may_be_zero(node.inputs[0])
    return node.op_type not in ("Shape", "Slice", "Gather")


def _plain_value(attribute: Any) -> Any:
    value = attribute.value
    return value.encode() if isinstance(value, str) else value
