"""A folded network as a plain floating-point ONNX model, and which of its tensors are quantized, and how."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError
from bnre_exp.export.folded import check_folded
from bnre_exp.export.onnx.records import Codes, Grid, Plain
from bnre_exp.export.onnx.resolve import DOMAIN, resolve
from bnre_exp.onnx_io.names import unique
from bnre_exp.onnx_io.opset import lower
from bnre_exp.quantsim.nodes import is_layer, source_of
from bnre_exp.quantsim.operations import input_quantizer, is_preserving
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer, Dequantize, positive
from bnre_exp.quantsim.sim import activation_quantizers
from bnre_exp.quantsim.tracing.tracer import check_decision

EXPORTER_OPSET = 18  # the lowest that torch's exporter writes by itself
OPSETS = (13, 23)  # per-channel DequantizeLinear came with 13


def plain_network(folded: Any, example_input: Tensor | Sequence[Tensor], opset: int = EXPORTER_OPSET) -> Plain:
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
    network: Any = copy.deepcopy(folded).cpu().float().eval()
    _check_calibrated(network)
    _check_example(network, inputs)
    marks = _mark(network)
    program = _export(network, inputs, max(opset, EXPORTER_OPSET))
    plain = resolve(program, marks.grids, marks.parameters)
    lower(plain.model, opset)
    return plain


def _check_calibrated(network: fx.GraphModule) -> None:
    for path, quantizer in activation_quantizers(network).items():
        if not quantizer.has_range:
            name = path.rpartition(".")[2]
            raise UserError(
                f"the activation quantizer {name} has no range yet; run calibrate(sim, loader) before folding"
            )


def _check_example(network: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
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


def _mark(network: fx.GraphModule) -> _Marks:
    """Put marks in place of quantizers and of the products of codes and scale."""
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
    return marks


def _grid(name: str, quantizer: ActivationQuantizer) -> Grid:
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
        axis, scale = _along_axis(name, dequantize)
        if not (np.isfinite(scale).all() and (scale >= np.finfo(np.float32).tiny).all()):
            raise UserError(
                f"a scale of {name}.{tensor} is {scale.min():g}, which float32 does not hold with full precision"
            )
        codes = chain.original.detach().contiguous().numpy().copy()
        marks.parameters.append(Codes(f"{name}.{tensor}", name, codes, scale, axis, dequantize.bits))
        chain[0] = _Mark("Codes", len(marks.parameters) - 1)


def _along_axis(name: str, dequantize: Dequantize) -> tuple[int | None, np.ndarray]:
    """The axis along which the scale of a weight or bias runs, None for one scale, and the scale as it does."""
    scale = dequantize.scale.detach().float().clone()
    if not dequantize.per_channel:
        return None, scale.numpy()
    if dequantize.ndim == 1 or not dequantize.transposed:
        return 0, scale.numpy()
    if dequantize.groups == 1:
        return 1, scale.numpy()
    along = dequantize.layout.expand(scale)  # [C_in, C_out / groups, 1, ...]
    if along.shape[1] > 1:
        raise UserError(
            f"{name} is a grouped transposed convolution with a scale per group and output channel, and ONNX has "
            "scales along one axis only; quantize that layer per tensor, or keep it in floating point with an "
            "override (off: true)"
        )
    return 0, along.flatten().numpy()  # a group is an output channel, which all inputs of that group give


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
