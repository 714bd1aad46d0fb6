"""QuantizeLinear and DequantizeLinear in a plain ONNX model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bnre_exp.errors import UserError
from bnre_exp.export.onnx.records import Codes, Grid, Plain
from bnre_exp.onnx_io.names import unique
from bnre_exp.onnx_io.opset import drop_unused

LARGEST_CODE = 255  # of uint8
WIDE_OPSET = 21  # (u)int4 and (u)int16 came with it


def check_expressible(grids: Sequence[Grid], parameters: Sequence[Codes], opset: int) -> None:
    """Raise ``UserError`` naming a tensor whose bits the opset has no type for."""
    wide = [f"{grid.name} ({grid.bits} bits)" for grid in grids if grid.bits > 8]
    wide += [f"{codes.name} ({codes.bits} bits)" for codes in parameters if codes.bits > 8 and codes.codes.ndim > 1]
    if wide and opset < WIDE_OPSET:
        raise UserError(
            f"opset {opset} has no integers of 9 to 16 bits, which {wide[0]}"
            f"{f' and {len(wide) - 1} more' if len(wide) > 1 else ''} need; use opset={WIDE_OPSET} or at most 8 bits"
        )


def insert_qdq(plain: Plain, int4: bool) -> Any:
    """The model with its weights as integers and its activations rounded; an ``onnx_ir.Model``; ``plain`` is used up.

    int4: 4-bit tensors get ONNX's 4-bit types where the opset has them; otherwise, as all below 8 bits, 8-bit types,
    the codes of activations being clipped to their bits.
    """
    opset = plain.model.opset_imports[""]
    check_expressible(plain.grids, plain.parameters, opset)
    has_int4 = int4 and opset >= WIDE_OPSET
    graph = plain.model.graph
    tensors = {value.name: value for value in (*graph.inputs, *(x for node in graph for x in node.outputs))}
    taken = set(tensors) | set(graph.initializers)
    for codes in plain.parameters:
        _dequantize(graph, codes, has_int4, taken)
    for grid in plain.grids:
        _quantize(graph, tensors[grid.name], grid, taken)
    _keep_apart(graph, taken)
    drop_unused(graph)
    graph.sort()
    return plain.model


def _dequantize(graph: Any, codes: Codes, has_int4: bool, taken: set[str]) -> None:
    import onnx_ir as ir

    weight = graph.initializers.pop(codes.name)
    if codes.codes.dtype == np.int32:
        dtype = ir.DataType.INT32
    elif codes.bits <= 4 and has_int4:
        dtype = ir.DataType.INT4
    else:
        dtype = ir.DataType.INT8 if codes.bits <= 8 else ir.DataType.INT16
    zero_type = ir.DataType.INT8 if dtype == ir.DataType.INT4 else dtype
    integers = _constant(graph, f"{codes.name}_codes", codes.codes, dtype, taken)
    # A scale along an axis even where there is one channel: the number of axes tells the kind of quantization.
    scale = codes.scale.astype(np.float32).reshape(() if codes.axis is None else -1)
    if dtype == ir.DataType.INT4:
        cast = ir.node("Cast", [integers], {"to": ir.DataType.INT8})
        _prepend(graph, [cast])
        integers = cast.outputs[0]
    zeros = np.zeros(scale.shape)  # said in full, since ONNX Runtime has QGemm only with zero points
    inputs = [
        integers,
        _constant(graph, f"{codes.name}_scale", scale, ir.DataType.FLOAT, taken),
        _constant(graph, f"{codes.name}_zero_point", zeros, zero_type, taken),
    ]
    attributes = {"axis": codes.axis} if codes.axis is not None else {}
    node = ir.node("DequantizeLinear", inputs, attributes, name=f"{codes.name}_dequantize")
    node.outputs[0].shape, node.outputs[0].type = weight.shape, weight.type
    ir.convenience.replace_all_uses_with(weight, node.outputs[0], replace_graph_outputs=True)
    node.outputs[0].name = codes.name
    _prepend(graph, [node])


def _quantize(graph: Any, tensor: Any, grid: Grid, taken: set[str]) -> None:
    """Round a tensor for all who read it."""
    readers, producer, clip = list(tensor.uses()), tensor.producer(), None
    is_output, shape, kind = tensor.is_graph_output(), tensor.shape, tensor.type
    low, high = 0, 2**grid.bits - 1
    source = tensor
    if grid.bits <= 8 and not is_output and (limits := _clip_limits(producer, grid)) is not None:
        # Clipped before rounding or after it is the same, and integer kernels end in rounding.
        (low, high), source, clip = limits, producer.inputs[0], producer
        producer = source.producer()
    nodes, result = _rounding(graph, source, grid, (low, high), taken)
    for use in readers:
        use.node.replace_input_with(use.idx, result)
    if producer is None:
        _prepend(graph, nodes)
    else:
        graph.insert_after(producer, nodes)
    if clip is not None:
        graph.remove(clip, safe=True)
    result.name, result.shape, result.type = unique(f"{grid.name}_quantized", taken), shape, kind
    if is_output:
        for index, output in enumerate(graph.outputs):
            if output is tensor:
                graph.outputs[index] = result
        if not tensor.is_graph_input():  # the output keeps its name
            result.name, tensor.name = tensor.name, unique(f"{grid.name}_float", taken)


def _keep_apart(graph: Any, taken: set[str]) -> None:
    """Where a tensor on one grid is rounded to another, a clip of the codes that changes none: ONNX Runtime would make
    one of the two grids, and it is neither."""
    import onnx_ir as ir

    for node in list(graph):
        before = node.inputs[0].producer() if node.op_type == "QuantizeLinear" else None
        codes = node.outputs[0]
        is_clipped = any(use.node.op_type == "Clip" for use in codes.uses())
        if before is None or before.op_type != "DequantizeLinear" or is_clipped or codes.dtype == ir.DataType.UINT16:
            continue
        ends = [_constant(graph, f"{node.name}_end", end, ir.DataType.UINT8, taken) for end in (0, LARGEST_CODE)]
        clip = ir.node("Clip", [codes, *ends], name=f"{node.name}_apart")
        clip.outputs[0].name = unique(f"{node.name}_apart", taken)
        ir.convenience.replace_all_uses_with(codes, clip.outputs[0])
        clip.replace_input_with(0, codes)
        graph.insert_after(node, clip)


def _prepend(graph: Any, nodes: list[Any]) -> None:
    if len(graph):
        graph.insert_before(graph[0], nodes)
    else:
        graph.extend(nodes)


def _clip_limits(node: Any, grid: Grid) -> tuple[int, int] | None:
    """The codes between which a Clip of known limits leaves a tensor that nothing else reads."""
    import onnx_ir as ir

    if node is None or node.op_type != "Clip" or node.domain != "" or len(node.inputs) < 3:
        return None
    low, high = (ir.convenience.get_const_tensor(value) if value is not None else None for value in node.inputs[1:3])
    if low is None or high is None:
        return None
    ends = (np.rint(np.float32(x.numpy()) / np.float32(grid.scale)) + grid.zero_point for x in (low, high))
    first, last = (int(np.clip(end, 0, 2**grid.bits - 1)) for end in ends)
    return first, last


def _rounding(
    graph: Any, tensor: Any, grid: Grid, ends: tuple[int, int], taken: set[str]
) -> tuple[list[Any], Any]:  # fmt: skip
    """The nodes that put a tensor on its grid, with codes between ``ends``, and what the last of them gives."""
    import onnx_ir as ir

    dtype, capacity = (ir.DataType.UINT8, LARGEST_CODE) if grid.bits <= 8 else (ir.DataType.UINT16, 65535)
    needs_clip = ends[0] > 0 or ends[1] < capacity
    nodes: list[Any] = []

    def constant(ending: str, value: Any, kind: Any) -> Any:
        return _constant(graph, f"{grid.name}_{ending}", np.asarray(value), kind, taken)

    def add(kind: str, inputs: list[Any], ending: str, named: str = "") -> Any:
        nodes.append(ir.node(kind, inputs, name=f"{grid.name}_{ending}"))
        result = nodes[-1].outputs[0]
        result.name = unique(f"{grid.name}_{named}", taken) if named else None
        return result

    scale = constant("scale", np.float32(grid.scale), ir.DataType.FLOAT)
    zero = constant("zero_point", grid.zero_point, dtype)
    value = tensor
    if needs_clip and dtype == ir.DataType.UINT16:  # runtimes clip floats and 8-bit integers, but no 16-bit ones
        low, high = (np.float32((code - grid.zero_point) * np.float64(grid.scale)) for code in ends)
        limits = [constant("low", low, ir.DataType.FLOAT), constant("high", high, ir.DataType.FLOAT)]
        value = add("Clip", [value, *limits], "clip", "limited")
    value = add("QuantizeLinear", [value, scale, zero], "quantize", "codes")
    if needs_clip and dtype == ir.DataType.UINT8:
        value = add(
            "Clip", [value, constant("low", ends[0], dtype), constant("high", ends[1], dtype)], "clip", "clipped"
        )
    return nodes, add("DequantizeLinear", [value, scale, zero], "dequantize")


def _constant(graph: Any, name: str, array: Any, dtype: Any, taken: set[str]) -> Any:
    import onnx_ir as ir

    # A 4-bit type, too, is numbers of 8 bits in numpy.
    kind = {"INT4": np.int8, "UINT4": np.uint8}.get(dtype.name) or dtype.numpy()
    name = unique(name, taken)
    tensor = ir.Tensor(np.asarray(array, dtype=kind), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
