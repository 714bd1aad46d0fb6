"""What an ONNX model may ask for: nothing that takes more memory than its files hold or a network needs, and no loop
without an end. ONNX Runtime and the tools that compute constants would do as they are told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from bnre_exp.errors import UserError

LARGEST = 2**30  # elements of a tensor, and of all that is computed from constants
LARGEST_INPUT = 2**28  # elements of an input, of which random ones are made
LONGEST = 10**6  # rounds of a loop that nothing else ends
SMALL = 1024  # elements of constants that may be sizes
FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def check_bounds(model: onnx.ModelProto) -> None:
    """Raise ``UserError`` naming a tensor that is larger than its data or than :data:`LARGEST`, or an endless loop."""
    graphs = [model.graph, *_inner(model.graph.node)]
    for function in model.functions:
        graphs += _inner(function.node)
    nodes = [node for part in (*graphs, *model.functions) for node in part.node]
    for tensor in [*(x for graph in graphs for x in graph.initializer), *(x for node in nodes for x in _tensors(node))]:
        _check_data(tensor)
    for graph in graphs:
        for sparse in graph.sparse_initializer:
            _check_size(f"the sparse tensor {sparse.values.name}", sparse.dims)
        weights = {tensor.name for tensor in graph.initializer}  # inputs as well, until IR version 4
        for item in graph.input:
            if item.name not in weights:
                _check_info(item, LARGEST_INPUT)
    known = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
    known |= {node.output[0]: x for node in nodes if node.op_type == "Constant" and node.output for x in _tensors(node)}
    for node in nodes:
        if node.op_type == "Loop" and len(node.input) > 1:
            _check_loop(node, known)
    _check_computed(model)


def _inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """The graphs inside nodes, at any depth."""
    for node in nodes:
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield graph
                yield from _inner(graph.node)


def _tensors(node: onnx.NodeProto) -> list[onnx.TensorProto]:
    return [x for item in node.attribute for x in (*([item.t] if item.HasField("t") else []), *item.tensors)]


def _check_size(what: str, sizes: Sequence[int], limit: int = LARGEST) -> int:
    """The number of elements; raises ``UserError`` if it is more than ``limit``, or a size is negative."""
    if any(size < 0 for size in sizes):
        raise UserError(f"{what} has a negative size in {list(sizes)}")
    count = math.prod(sizes)
    if count > limit:
        raise UserError(f"{what} has {' x '.join(map(str, sizes))} elements, expected at most {limit:,}")
    return count


def _check_info(item: onnx.ValueInfoProto, limit: int = LARGEST) -> int:
    """The number of elements as far as sizes are known."""
    sizes = [dim.dim_value for dim in item.type.tensor_type.shape.dim if dim.HasField("dim_value")]
    return _check_size(f"the tensor {item.name}", [max(size, 0) for size in sizes], limit)


def _check_data(tensor: onnx.TensorProto) -> None:
    """Raise ``UserError`` unless the tensor holds as many values as its sizes say."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise UserError(f"the values of the tensor {tensor.name} are in another file; read the model with load_model")
    count = math.prod(tensor.dims)
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
        typed = len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type)))
    except (KeyError, TypeError, ValueError):  # strings have no width
        bits, typed = 8, max(len(getattr(tensor, field)) for field in FIELDS)
    if tensor.HasField("raw_data"):
        fits = len(tensor.raw_data) == -(-count * bits // 8)
    else:
        fits = typed in (count, 2 * count, -(-count * bits // 8))  # 2: complex numbers; last: several in a byte
    if not fits or any(size < 0 for size in tensor.dims):
        raise UserError(f"the tensor {tensor.name} does not hold the values of its shape {list(tensor.dims)}")


def _check_loop(node: onnx.NodeProto, known: dict[str, onnx.TensorProto]) -> None:
    """Raise ``UserError`` for a loop that only the number of its rounds could end, and that is too large."""
    rounds = known.get(node.input[0])
    count = math.inf if not node.input[0] else int(numpy_helper.to_array(rounds).ravel()[0]) if rounds else 0
    body = next((attribute.g for attribute in node.attribute if attribute.name == "body"), None)
    if count <= LONGEST or body is None or not body.output or len(body.input) < 2:
        return
    makers = {name: inner for inner in body.node for name in inner.output}
    condition = body.output[0].name
    while condition in makers and makers[condition].op_type in ("Identity", "Cast") and makers[condition].input:
        condition = makers[condition].input[0]
    is_computed = condition in makers and makers[condition].op_type != "Constant"
    if not is_computed:
        raise UserError(
            f"the loop {node.name or node.output[0]} goes on for {count} rounds, expected at most {LONGEST:,} or a "
            "condition that is computed"
        )


def _check_computed(model: onnx.ModelProto) -> None:
    """Raise ``UserError`` if a tensor that is computed, or the sum of those computed from constants, is too large."""
    try:
        inferred = onnx.shape_inference.infer_shapes(_slim(model), data_prop=True)
    except Exception:  # what it cannot tell, the runtime refuses or runs
        return
    graphs = [inferred.graph, *_inner(inferred.graph.node)]
    sizes = {x.name: _check_info(x) for graph in graphs for x in (*graph.value_info, *graph.output)}
    constants, total = {"", *(tensor.name for tensor in inferred.graph.initializer)}, 0
    for node in inferred.graph.node:
        if set(node.input) <= constants:
            constants.update(node.output)
            total += sum(sizes.get(name, 0) for name in node.output)
    _check_size("what the model computes from constants alone", [total])


def _slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the values of large tensors, which tell no size and may be more than protobuf takes."""
    slim = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    slim.graph.name = model.graph.name
    slim.graph.node.extend(model.graph.node)
    slim.graph.input.extend(model.graph.input)
    for item in model.graph.output:  # without what the file says of it, which would hide what is computed
        slim.graph.output.add(name=item.name)
    for tensor in model.graph.initializer:
        head = slim.graph.initializer.add(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        if math.prod(tensor.dims) <= SMALL:
            head.CopyFrom(tensor)
    return slim
