"""Re-estimation of the statistics of an ONNX model's batch norms, undoable."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper, numpy_helper

from bnre_exp.algorithms.bn_statistics import (
    Estimator,
    Statistics,
    StatisticsHandle,
    check_arguments,
    check_count,
    commit,
    observe_batches,
)
from bnre_exp.algorithms.feeding import Passes
from bnre_exp.errors import UserError
from bnre_exp.onnx.constants import (
    MEAN,
    VAR,
    bn_name,
    check_values,
    find_computed_constants,
    inner_batch_norms,
    is_batch_norm,
    why_not_in_inference,
)
from bnre_exp.onnx_io.bounds import check_bounds
from bnre_exp.onnx_io.names import names_of, unique
from bnre_exp.onnx_io.proto import Node, Value, constant, from_proto, to_proto
from bnre_exp.onnx_io.session import feeds, open_session, run_session
from bnre_exp.progress import Progress, no_progress

OLDEST_OPSET = 9  # before, a batch norm could normalize every position by itself


@dataclass(kw_only=True)
class OnnxReestimationHandle(StatisticsHandle):
    """Undoes the re-estimation of an ONNX model.

    reestimated: names of the batch norms with new statistics; skipped: ``(name, reason)`` of the others.
    """

    reestimated: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


@dataclass
class _Bn:
    """Nodes that share statistics; one, unless the network calls a batch norm more than once."""

    nodes: list[Node]
    name: str
    mean: np.ndarray
    var: np.ndarray


def reestimate_bn_stats(
    model: onnx.ModelProto,
    batches: Iterable[Any],
    num_batches: int = 100,
    *,
    method: str = "batch_average",
    momentum: float = 0.1,
    providers: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> OnnxReestimationHandle:
    """Replace mean and variance of every BatchNormalization of an ONNX model; in place, and nothing else changes.

    The model is run by ONNX Runtime on each batch, in floating point or with the quantizers that it has, its batch
    norms normalizing by the batch as in training. That is what :func:`bnre_exp.reestimate_bn_stats` does to a module.

    batches: training data; fewer than ``num_batches`` are iterated again. A batch: an array or tensor ``[N, ...]``, a
    tuple or list whose first element is one, or a mapping of input names to arrays. method: "batch_average", "pooled"
    or "ema", as there. providers: of ONNX Runtime; None: the CPU.

    Returns a handle that undoes it. Raises ``UserError`` if the model has no batch norm with constant statistics or an
    opset below 9, constants that are not finite, or asks for more than a network needs; ONNX Runtime does not take it;
    the batches do not fit its inputs or are not finite; or a statistic is not finite. The model is then as before.
    """
    check_arguments(method, num_batches)
    check_bounds(model)
    source = from_proto(model)
    if (opset := source.opset_imports.get("", 1)) < OLDEST_OPSET:
        raise UserError(
            f"The model has opset {opset}; expected {OLDEST_OPSET} or higher "
            "(onnx.version_converter.convert_version brings it up)."
        )
    bns, skipped = _find(source)
    if not bns:
        raise UserError(_nothing_to_do(skipped))
    check_values(source, with_statistics=method == "ema")  # the others start from nothing
    estimators = [Estimator(method, momentum, _tensor(bn.mean), _tensor(bn.var)) for bn in bns]
    session = open_session(_observed(model, source, bns), providers)
    count = Passes()

    def observe(batch: Any) -> None:
        given, number = feeds(session, batch), count.batches
        for name, values in given.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise UserError(
                    f"Batch {number} of the data holds values that are not finite for the input {name}; nothing was "
                    "changed. Leave such samples out, or mend how they are preprocessed."
                )
        _take_in(run_session(session, given), bns, estimators, number)

    for _ in observe_batches(batches, num_batches, observe, count, progress):
        pass
    names = {index: bn.name for index, bn in enumerate(bns)}
    results = {index: _rounded(bn, estimators[index]) for index, bn in enumerate(bns)}
    return OnnxReestimationHandle(
        num_batches=count.batches,
        loader_passes=count.passes,
        reestimated=tuple(names.values()),
        skipped=tuple(skipped),
        _undo=commit(names, results, lambda index, statistics: _write(model, source, bns[index], statistics)),
    )


def _rounded(bn: _Bn, estimator: Estimator) -> Statistics:
    """The result as the types of the old statistics hold it, in float64."""
    mean, var = (values.numpy() for values in estimator.result(torch.float64))
    with np.errstate(all="ignore"):
        return _tensor(mean.astype(bn.mean.dtype)), _tensor(var.astype(bn.var.dtype))


def _tensor(values: np.ndarray) -> torch.Tensor:
    """Float64, from any type that numpy or ml_dtypes has."""
    return torch.from_numpy(values.astype(np.float64))


def _nothing_to_do(skipped: list[tuple[str, str]]) -> str:
    if skipped:
        name, reason = skipped[0]
        return f"None of the model's {len(skipped)} batch norms can be re-estimated: {name} {reason}."
    return (
        "The model has no BatchNormalization operation. Exporters fold batch norm into the layers before it unless "
        "they are told not to (torch.onnx.export: optimize=False)."
    )


def _find(model: ir.Model) -> tuple[list[_Bn], list[tuple[str, str]]]:
    """Batch norms whose statistics are constants, and why others are left out."""
    bns: dict[Any, _Bn] = {}
    skipped: list[tuple[str, str]] = []
    nodes: list[Node] = [node for node in model.graph if is_batch_norm(node)]
    if any(constant(value) is None for node in nodes for value in node.inputs[MEAN:]):
        find_computed_constants(model)
    for node in nodes:
        key = tuple(map(_root, node.inputs[1:]))
        mean, var = map(constant, key[MEAN - 1 :])
        reason = why_not_in_inference(node)
        if reason is not None or mean is None or var is None:
            skipped.append((bn_name(node), reason or "has statistics that are computed, or inputs of the model"))
            continue
        # Exporters keep equal tensors once, so that all batch norms of an untrained network seem to be one.
        is_untrained = not mean.any() and bool((var == 1).all())
        bns.setdefault(node if is_untrained else key, _Bn([], bn_name(node), mean, var)).nodes.append(node)
    return list(bns.values()), skipped + [(bn_name(node), reason) for node, reason in inner_batch_norms(model)]


def _root(value: Value) -> Value:
    """Where a tensor comes from; exporters hand on equal ones by Identity."""
    while (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    return value


def _observed(model: onnx.ModelProto, source: ir.Model, bns: list[_Bn]) -> onnx.ModelProto:
    """A copy whose batch norms normalize by the batch, and whose outputs are the statistics of each of their calls:
    mean and biased variance in float64, and how many values they are of."""
    observed = from_proto(model)
    copies = dict(zip(source.graph, observed.graph))
    observed.graph.outputs.clear()
    for bn in bns:
        for node in (copies[original] for original in bn.nodes):
            tape = ir.tape.Tape()
            outputs = _statistics(tape, node.inputs[0], bn.mean.size, observed.opset_imports[""])
            for index, value, kind in ((MEAN, outputs[0], bn.mean.dtype), (VAR, outputs[1], bn.var.dtype)):
                node.replace_input_with(index, tape.op("Cast", [value], {"to": ir.DataType.from_numpy(kind)}))
            for number, made in enumerate(tape.nodes):
                made.outputs[0].name = f"bnre_exp.{node.outputs[0].name}.{number}"
            observed.graph.insert_before(node, tape.nodes)
            observed.graph.outputs.extend(outputs)
    return to_proto(observed, model)


def _statistics(tape: ir.tape.Tape, x: Value, channels: int, opset: int) -> list[Value]:
    """Mean, biased variance (``[C]``, float64) and the number of values of ``x`` ``[N, C, ...]``."""

    def integers(*values: int) -> Value:
        return tape.op("Constant", [], {"value": ir.tensor(np.array(values, np.int64))})

    def mean_of(value: Value) -> Value:
        if opset >= 18:
            return tape.op("ReduceMean", [value, integers(0, 2)], {"keepdims": 0})
        return tape.op("ReduceMean", [value], {"axes": [0, 2], "keepdims": 0})

    wide = tape.op("Cast", [x], {"to": ir.DataType.DOUBLE})
    rows = tape.op("Reshape", [wide, integers(0, channels, -1)])
    mean = mean_of(rows)
    centred = tape.op("Sub", [rows, tape.op("Reshape", [mean, integers(1, channels, 1)])])
    outputs = [mean, mean_of(tape.op("Mul", [centred, centred])), tape.op("Size", [x])]
    for value, kind in zip(outputs, (ir.DataType.DOUBLE, ir.DataType.DOUBLE, ir.DataType.INT64)):
        value.type = ir.TensorType(kind)
    return outputs


def _take_in(results: Sequence[Any], bns: list[_Bn], estimators: list[Estimator], number: int) -> None:
    values = iter(results)
    for bn, estimator in zip(bns, estimators):
        for node in bn.nodes:
            mean, var, size = next(values), next(values), int(next(values))
            count = size // bn.mean.size
            check_count(bn_name(node), count)
            if not (np.isfinite(mean).all() and np.isfinite(var).all()):
                raise UserError(
                    f"The batch norm {bn_name(node)} gets values that are not finite in batch {number}; nothing was "
                    "changed. Look for weights that are too large, and for values that the type of the model does not "
                    "hold."
                )
            estimator.add(torch.from_numpy(mean), torch.from_numpy(var) * (count / (count - 1)), count)


def _write(model: onnx.ModelProto, source: ir.Model, bn: _Bn, statistics: Statistics) -> Callable[[], None]:
    """Put statistics in place of the old ones; returns what takes that back."""
    with ExitStack() as undo:
        for index, old, values in ((MEAN, bn.mean, statistics[0]), (VAR, bn.var, statistics[1])):
            undo.callback(_write_tensor(model, source.graph, bn.nodes, index, values.numpy().astype(old.dtype)))
        return undo.pop_all().close


def _write_tensor(
    model: onnx.ModelProto, graph: ir.Graph, nodes: list[Node], index: int, values: np.ndarray
) -> Callable[[], Any]:
    """Put new values in place of the old in the protobuf itself, under the old name unless something else reads that,
    too; returns what takes that back. graph: what ``model`` is read as, its tensors those of ``model``."""
    old = nodes[0].inputs[index]
    is_own = {(use.node, use.idx) for use in old.uses()} == {(node, index) for node in nodes}
    is_given = old.is_initializer() or (old.producer() is not None and old.producer().op_type == "Constant")
    tensor = ir.convenience.get_const_tensor(old)
    if is_own and is_given and not old.is_graph_output() and isinstance(tensor, ir.TensorProtoTensor):
        proto, before = tensor.raw, copy.deepcopy(tensor.raw)
        proto.CopyFrom(numpy_helper.from_array(values, proto.name))
        return lambda: proto.CopyFrom(before)
    suffix = "running_mean" if index == MEAN else "running_var"
    name = unique(f"{nodes[0].outputs[0].name}_{suffix}", names_of(graph))
    protos = dict(zip(graph, model.graph.node))
    olds = [(protos[node], protos[node].input[index]) for node in nodes]
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    if model.ir_version < 4:  # an initializer was an input as well
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        model.graph.input.append(helper.make_tensor_value_info(name, kind, values.shape))
    for node in nodes:
        node.replace_input_with(index, ir.Value(name=name))
        protos[node].input[index] = name

    def restore() -> None:
        for proto, original in olds:
            proto.input[index] = original
        for items in (model.graph.initializer, model.graph.input):
            for item in [item for item in items if item.name == name]:
                items.remove(item)

    return restore
