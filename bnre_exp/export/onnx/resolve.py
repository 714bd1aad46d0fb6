"""From a graph with marks, as torch's exporter leaves it, to a plain one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bnre_exp.export.onnx.pooling import pad_before_pooling, pool_globally
from bnre_exp.export.onnx.records import Codes, Grid, Plain, dequantized
from bnre_exp.onnx_io.names import unique
from bnre_exp.onnx_io.opset import drop_unused

DOMAIN = "bnre_exp"  # of the nodes that mark quantized tensors between export and resolution
OUTPUT = "output"  # what a model's only output is called


def resolve(model: Any, marked_grids: Sequence[Grid], marked_codes: Sequence[Codes]) -> Plain:
    """Take the marks out, in place; what they stood for is known by the names of the tensors they were on."""
    grids: dict[Any, Grid] = {}  # by value
    parameters: list[Codes] = []
    for node in list(model.graph):
        if node.domain != DOMAIN:
            continue
        index = node.attributes["index"].as_int()
        if node.op_type == "Grid":
            _unmark(model.graph, node, marked_grids[index], grids)
        else:
            parameters.append(_as_float(model.graph, node, marked_codes[index]))
        model.graph.remove(node, safe=True)
    pool_globally(model.graph)
    pad_before_pooling(model.graph)
    drop_unused(model.graph)
    model.opset_imports.pop(DOMAIN, None)
    model.graph.sort()
    _name_tensors(model.graph, grids)
    return Plain(model, tuple(replace(grid, name=value.name) for value, grid in grids.items()), tuple(parameters))


def _unmark(graph: Any, mark: Any, grid: Grid, grids: dict[Any, Grid]) -> None:
    """Put the grid on the tensor before a mark, and hand that on to the mark's readers.

    Where others read that tensor as it is - equal operations, of which the exporter keeps one, or what is left of an
    operation that did nothing - the mark's readers get a tensor of their own.
    """
    import onnx_ir as ir

    (source,), (result,) = mark.inputs, mark.outputs
    before = grids.get(source)
    if before is None or (before.scale, before.zero_point, before.bits) != (grid.scale, grid.zero_point, grid.bits):
        if before is not None or len(source.uses()) > 1 or source.is_graph_output() or source.is_initializer():
            same = ir.node("Identity", [source])
            same.outputs[0].shape, same.outputs[0].type = source.shape, source.type
            graph.insert_before(mark, same)
            source = same.outputs[0]
        grids[source] = grid
    ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)


def _name_tensors(graph: Any, grids: dict[Any, Grid]) -> None:
    """Each quantized tensor by its grid, the only output "output", and everything by a name of its own."""
    wanted = {value: grid.name for value, grid in grids.items()}
    if len(graph.outputs) == 1:
        wanted[graph.outputs[0]] = OUTPUT
    taken = {value.name for value in graph.inputs} | set(graph.initializers)
    values = [value for node in graph for value in node.outputs]
    for value in [*(v for v in values if v in wanted), *(v for v in values if v not in wanted)]:
        value.name = unique(wanted.get(value, value.name), taken)


def _as_float(graph: Any, mark: Any, codes: Codes) -> Codes:
    """Put the product of codes and scale in place of a mark; what transposes a weight is done to the codes."""
    import onnx_ir as ir

    result = mark.outputs[0]
    readers = [use.node for use in result.uses()]
    if (
        readers
        and all(node.op_type == "Transpose" and node.domain == "" for node in readers)
        and not (result.is_graph_output() or any(node.outputs[0].is_graph_output() for node in readers))
    ):
        orders = {tuple(_ints(node, "perm") or reversed(range(codes.codes.ndim))) for node in readers}
        if len(orders) == 1:
            (order,) = orders
            axis = None if codes.axis is None else order.index(codes.axis)
            codes = replace(codes, codes=np.ascontiguousarray(codes.codes.transpose(order)), axis=axis)
            for node in readers:
                ir.convenience.replace_all_uses_with(node.outputs[0], result)
                graph.remove(node, safe=True)
    values = ir.tensor(dequantized(codes), name=codes.name)
    weight = ir.Value(
        name=codes.name, shape=ir.Shape(codes.codes.shape), type=ir.TensorType(values.dtype), const_value=values
    )
    graph.register_initializer(weight)
    ir.convenience.replace_all_uses_with(result, weight, replace_graph_outputs=True)
    return codes


def _ints(node: Any, name: str) -> tuple[int, ...] | None:
    attribute = node.attributes.get(name)
    return None if attribute is None else tuple(attribute.as_ints())
