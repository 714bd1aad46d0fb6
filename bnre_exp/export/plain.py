"""A folded network as a plain floating-point ONNX model, and which of its tensors are quantized, and how."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError
from bnre_exp.export.checkpoint import check_folded
from bnre_exp.ort.opset import drop_unused, lower, replace_node
from bnre_exp.quantsim.nodes import is_layer, source_of
from bnre_exp.quantsim.operations import is_preserving
from bnre_exp.quantsim.quantizer import ActivationQuantizer, Dequantize, positive
from bnre_exp.quantsim.tracer import check_decision
from bnre_exp.stages.bias import input_quantizer

EXPORTER_OPSET = 18  # the lowest that torch's exporter writes by itself
OPSETS = (13, 23)  # per-channel DequantizeLinear came with 13
OUTPUT = "output"  # what a model's only output is called
DOMAIN = "bnre_exp"  # of the nodes that mark quantized tensors between export and resolution


@dataclass(frozen=True)
class Grid:
    """Grid of a quantized activation: ``(code - zero_point) * scale``, code from 0 to 2^bits - 1.

    name: of the tensor in the model.
    """

    name: str
    scale: float
    zero_point: int
    bits: int


@dataclass(frozen=True)
class Codes:
    """A quantized weight or bias: ``codes * scale``.

    name: of the initializer in the model; layer: the module it belongs to; codes: signed integers, of the initializer's
    shape; scale: float32 ``[C]`` along ``axis``, or ``[1]`` with axis None; bits: of the codes.
    """

    name: str
    layer: str
    codes: np.ndarray
    scale: np.ndarray
    axis: Optional[int]
    bits: int


@dataclass(frozen=True)
class Plain:
    """model: an ``onnx_ir.Model`` that computes in float32, with weights that are codes times scale. A tensor that has
    a grid is not rounded in it."""

    model: Any
    grids: tuple[Grid, ...]
    parameters: tuple[Codes, ...]


def plain_network(
    folded: fx.GraphModule, example_input: Union[Tensor, Sequence[Tensor]], opset: int = EXPORTER_OPSET
) -> Plain:
    """Export a folded network, its quantizers left out and listed; the network is unchanged.

    example_input: one batch ``[N, ...]`` with N >= 2, or a tuple of inputs; the batch size of the model is dynamic.

    Raises ``UserError`` if the network is not folded, holds what ONNX or the exporter cannot express, or the opset is
    not one of 13 to 23.
    """
    low, high = OPSETS
    if type(opset) is not int or not low <= opset <= high:
        raise UserError(f"opset={opset!r}: expected {low} to {high}")
    check_folded(folded)
    inputs = tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)
    if not inputs or not all(isinstance(x, Tensor) and x.dim() and len(x) >= 2 for x in inputs):
        raise UserError(
            "example_input: expected a batch [N, ...] of at least 2 as a tensor, or a tuple of such tensors"
        )
    inputs = tuple(x.detach().cpu().float() if x.is_floating_point() else x.detach().cpu() for x in inputs)
    network, marks = _marked(folded)
    _check_example(folded, inputs)
    program = _export(network, inputs, max(opset, EXPORTER_OPSET))
    plain = _resolve(program, marks)
    lower(plain.model, opset)
    return plain


def _check_example(folded: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    network: Any = copy.deepcopy(folded).cpu().float().eval()
    try:
        with torch.no_grad():
            network(*inputs)
    except Exception as error:  # whatever its layers raise
        shapes = ", ".join(str(list(x.shape)) for x in inputs)
        raise UserError(f"example_input: the network cannot take {shapes} ({_cause(error)})") from error


class _Mark(nn.Module):
    """Stands for a quantizer while the exporter works: a node that it neither knows nor changes."""

    def __init__(self, kind: str, index: int) -> None:
        super().__init__()
        self.kind, self.index = kind, index

    def forward(self, x: Tensor) -> Tensor:
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.kind}", (x,), {"index": self.index}, dtype=torch.float32, shape=x.shape, version=1
        )
        return marked


@dataclass(frozen=True)
class _Marks:
    grids: list[Grid]
    parameters: list[Codes]


def _marked(folded: fx.GraphModule) -> tuple[fx.GraphModule, _Marks]:
    """A copy on the CPU with marks in place of quantizers and of the products of codes and scale."""
    network: Any = copy.deepcopy(folded).cpu().float().eval()
    marks = _Marks([], [])
    for node in network.graph.find_nodes(op="call_function", target=check_decision):
        network.graph.erase_node(node)
    _quantize_layer_inputs(network)
    network.graph.eliminate_dead_code()
    network.recompile()
    for name, module in list(network.named_modules()):
        if isinstance(module, ActivationQuantizer):
            marks.grids.append(_grid(name.rpartition(".")[2], module))
            network.set_submodule(name, _Mark("Grid", len(marks.grids) - 1))
        elif parametrize.is_parametrized(module):
            _mark_parameters(name, module, marks)
    return network, marks


def _grid(name: str, quantizer: ActivationQuantizer) -> Grid:
    if not quantizer.has_range:
        raise UserError(f"the activation quantizer {name} has no range yet; run calibrate(sim, loader) before folding")
    scale = float(positive(quantizer.scale.detach()).float())
    zero_point = int(quantizer.grid_zero_point().detach().round())
    if not scale >= np.finfo(np.float32).tiny or not np.isfinite(scale):
        raise UserError(f"the scale of {name} is {scale:g}, which float32 does not hold with full precision")
    return Grid(name, scale, zero_point, quantizer.bits)


def _mark_parameters(name: str, layer: Any, marks: _Marks) -> None:
    for tensor, chain in layer.parametrizations.items():
        dequantize = chain[0]
        if not isinstance(dequantize, Dequantize):
            raise UserError(f"the {tensor} of {name} has a parametrization that is not of bnre_exp: {dequantize}")
        scale = dequantize.scale.detach().numpy().copy()
        if not (np.isfinite(scale).all() and (scale >= np.finfo(np.float32).tiny).all()):
            raise UserError(
                f"a scale of {name}.{tensor} is {scale.min():g}, which float32 does not hold with full precision"
            )
        codes = chain.original.detach().contiguous().numpy().copy()
        marks.parameters.append(
            Codes(f"{name}.{tensor}", name, codes, scale, _channel_axis(name, dequantize), dequantize.bits)
        )
        chain[0] = _Mark("Codes", len(marks.parameters) - 1)


def _channel_axis(name: str, dequantize: Dequantize) -> Optional[int]:
    if dequantize.scale.numel() == 1 and dequantize.ndim > 1:
        return None
    if dequantize.ndim > 1 and dequantize.transposed:
        if dequantize.groups > 1:
            raise UserError(
                f"{name} is a grouped transposed convolution with a scale per group and output channel, and ONNX has "
                "scales along one axis only; quantize that layer per tensor, or keep it in floating point with an "
                "override (off: true)"
            )
        return 1
    return 0


def _quantize_layer_inputs(network: fx.GraphModule) -> None:
    """Where a layer reads a quantized tensor through operations that only move values, say so directly before it: the
    values are on the grid already, and integer kernels are found by looking at a layer's neighbours."""
    added: dict[fx.Node, fx.Node] = {}
    taken = set(dir(network))
    for layer in [node for node in network.graph.nodes if is_layer(node)]:
        source, quantizer = source_of(layer), input_quantizer(layer)
        if quantizer is None or not is_preserving(source):
            continue
        if source not in added:
            name = unique(f"{source.name}_on_grid", taken)
            network.add_submodule(name, copy.deepcopy(quantizer))
            with network.graph.inserting_after(source):
                added[source] = network.graph.call_module(name, (source,))
        layer.args = (added[source], *layer.args[1:])


def _export(network: fx.GraphModule, inputs: tuple[Tensor, ...], opset: int) -> Any:
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                network, inputs, dynamo=True, opset_version=opset, verbose=False,
                dynamic_shapes=tuple({0: batch} for _ in inputs),
            )  # fmt: skip
    except Exception as error:  # torch.export and the exporter raise many kinds
        raise UserError(f"torch's exporter cannot express it in ONNX: {_cause(error)}") from error
    if program is None:
        raise UserError("torch's exporter returned nothing")
    return program.model


def _cause(error: BaseException) -> str:
    """The first line of the innermost error, which names the operation."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own messages are for those who work on the exporter."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _resolve(model: Any, marks: _Marks) -> Plain:
    """Take the marks out; what they stood for is known by the names of the tensors they were on."""
    grids: dict[Any, Grid] = {}  # by value
    parameters: list[Codes] = []
    for node in list(model.graph):
        if node.domain != DOMAIN:
            continue
        index = node.attributes["index"].as_int()
        if node.op_type == "Grid":
            _unmark(model.graph, node, marks.grids[index], grids)
        else:
            parameters.append(_as_float(model.graph, node, marks.parameters[index]))
        model.graph.remove(node, safe=True)
    _pool_globally(model.graph)
    _pad_before_pooling(model.graph)
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


def unique(name: str, taken: set[str]) -> str:
    """The name, with a number after it if it is taken; taken from now on."""
    found = next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in taken)
    taken.add(found)
    return found


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


def dequantized(codes: Codes) -> np.ndarray:
    """Codes times scale, float32, of the shape of the codes."""
    shape = [1] * codes.codes.ndim
    if codes.axis is not None:
        shape[codes.axis] = -1
    product: np.ndarray = codes.codes.astype(np.float32) * codes.scale.astype(np.float32).reshape(shape)
    return product


def _ints(node: Any, name: str) -> Optional[tuple[int, ...]]:
    attribute = node.attributes.get(name)
    return None if attribute is None else tuple(attribute.as_ints())


def _pad_before_pooling(graph: Any) -> None:
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


def _pool_globally(graph: Any) -> None:
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
