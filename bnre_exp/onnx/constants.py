"""Batch norms of an ONNX graph, and its constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bnre_exp.errors import UserError
from bnre_exp.onnx_io.proto import Node, Value, constant

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
MEAN, VAR = 3, 4  # inputs of a BatchNormalization node
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def find_computed_constants(model: ir.Model) -> None:
    """Give the tensors that the graph computes from constants alone, but for what quantizers give, their values."""
    from onnxscript import optimizer

    try:
        copied = model.clone()
        optimizer.fold_constants(copied, should_fold=lambda node: False if node.op_type in QUANTIZERS else None)
    except Exception:  # whatever it cannot evaluate stays unknown
        return
    found = copied.graph.initializers
    for value in [value for node in model.graph for value in node.outputs]:
        if value.name and value.name in found and constant(value) is None:
            value.const_value = found[value.name].const_value


def check_values(model: ir.Model, *, with_statistics: bool) -> None:
    """Raise ``UserError`` naming a node and its constant, if that holds NaN, or is the weight of a layer, a scale or a
    parameter of a batch norm that is not finite, or a negative variance.

    with_statistics: mean and variance of batch norms as well. Infinity elsewhere has a meaning: as the end of a range,
    or in a mask.
    """
    functions = [node for function in model.functions.values() for node in function.all_nodes()]
    for node in [*model.graph.all_nodes(), *functions]:
        is_norm = is_batch_norm(node)
        inputs: list[Value] = list(node.inputs)
        for index, value in enumerate(inputs):
            values = constant(value) if with_statistics or not is_norm or index not in (MEAN, VAR) else None
            if values is None or values.dtype.kind in "biuSUO" or "int" in values.dtype.name:
                continue
            is_number = is_norm or node.op_type in (*LAYERS, *QUANTIZERS)
            bad = ~np.isfinite(values) if is_number else np.isnan(values)
            if bad.any():
                what = f"{int(bad.sum())} values that are not finite"
            elif is_norm and index == VAR and (values < 0).any():
                what = f"a negative variance, {float(values.min()):.3g}"
            else:
                continue
            raise UserError(
                f"The tensor {value.name} of {bn_name(node) if is_norm else node_name(node)} ({node.op_type}) holds "
                f"{what}: the model is damaged, or its training diverged. Nothing was changed; export it again from a "
                "network whose outputs are finite."
            )


def bn_name(node: Node) -> str:
    """What to call a batch norm: the module it came from, where its parameters tell, else its node or output."""
    module, _, parameter = str(node.inputs[MEAN].name).rpartition(".")
    if module and parameter in ("running_mean", "moving_mean", "mean"):
        return module
    return node_name(node)


def node_name(node: Node) -> str:
    """The name of a node, that of its output where it has none."""
    return str(node.name or node.outputs[0].name)


def is_batch_norm(node: Node) -> bool:
    """Whether the node is ONNX's own BatchNormalization, with all its inputs."""
    return (node.domain, node.op_type, len(node.inputs)) == ("", "BatchNormalization", 5) and None not in node.inputs


def inner_batch_norms(model: ir.Model) -> list[tuple[Node, str]]:
    """Batch norms that are not in the graph itself, and where they are, in words."""
    bodies = [node for node in model.graph.all_nodes() if node.graph is not model.graph]
    functions = [node for function in model.functions.values() for node in function.all_nodes()]
    in_function = "is in a function of the model (onnx.inliner puts those in place)"
    found = [(node, "is in the body of an If or Loop") for node in bodies] + [(node, in_function) for node in functions]
    return [(node, reason) for node, reason in found if is_batch_norm(node)]


def why_not_in_inference(node: Node) -> str | None:
    """Why a batch norm does not normalize by its statistics, channel by channel; None if it does."""
    number, outputs = node.attributes.get_int, sum(bool(value.name) for value in node.outputs)
    if number("training_mode", 0) or outputs > 1 or not number("is_test", 1):
        return "is in training mode: it normalizes each batch by its own statistics"
    if not number("spatial", 1):
        return "normalizes every position by statistics of its own (spatial=0)"
    return None
