"""Re-estimation of the statistics of an ONNX model's batch norms, undoable."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

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
    bn_name,
    computed_constants,
    constants_of,
    inner_batch_norms,
    is_batch_norm,
    opset_of,
    why_not_in_inference,
)
from bnre_exp.onnx_io.names import names_of, unique
from bnre_exp.onnx_io.session import feeds, open_session, run_session
from bnre_exp.progress import Progress, no_progress

OLDEST_OPSET = 9  # before, a batch norm could normalize every position by itself
MEAN, VAR = 3, 4  # inputs of a BatchNormalization node


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

    nodes: list[onnx.NodeProto]
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
    opset below 9, ONNX Runtime does not take it, the batches do not fit its inputs, or a statistic is not finite; the
    model is then as before.
    """
    check_arguments(method, num_batches)
    if opset_of(model) < OLDEST_OPSET:
        raise UserError(
            f"The model has opset {opset_of(model)}; expected {OLDEST_OPSET} or higher "
            "(onnx.version_converter.convert_version brings it up)."
        )
    bns, skipped = _find(model)
    if not bns:
        raise UserError(_nothing_to_do(skipped))
    estimators = [Estimator(method, momentum, _tensor(bn.mean), _tensor(bn.var)) for bn in bns]
    session = open_session(_observed(model, bns), providers)
    count = Passes()

    def observe(batch: Any) -> None:
        _take_in(run_session(session, feeds(session, batch)), bns, estimators)

    for _ in observe_batches(batches, num_batches, observe, count, progress):
        pass
    names = {index: bn.name for index, bn in enumerate(bns)}
    results = {index: _rounded(bn, estimators[index]) for index, bn in enumerate(bns)}
    return OnnxReestimationHandle(
        num_batches=count.batches,
        passes=count.passes,
        reestimated=tuple(names.values()),
        skipped=tuple(skipped),
        _undo=commit(names, results, lambda index, statistics: _write(model, bns[index], statistics)),
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


def _find(model: onnx.ModelProto) -> tuple[list[_Bn], list[tuple[str, str]]]:
    """Batch norms whose statistics are constants, and why others are left out."""
    graph, skipped = model.graph, []
    constants = constants_of(graph)
    makers = {name: node for node in graph.node for name in node.output}
    nodes = [node for node in graph.node if is_batch_norm(node)]
    if any(name not in constants.tensors for node in nodes for name in node.input[MEAN:]):
        constants.tensors = {**computed_constants(model), **constants.tensors}

    def root(name: str) -> str:
        """Where a tensor comes from; exporters hand on equal ones by Identity."""
        while name in makers and makers[name].op_type == "Identity":
            name = makers[name].input[0]
        return name

    groups: dict[tuple[str, ...], list[onnx.NodeProto]] = {}
    for node in nodes:
        reason = why_not_in_inference(node)
        if reason is None and any(constants.value(root(name)) is None for name in node.input[MEAN:]):
            reason = "has statistics that are computed, or inputs of the model"
        if reason is not None:
            skipped.append((bn_name(node), reason))
        else:
            groups.setdefault(tuple(map(root, node.input[1:])), []).append(node)
    skipped += [(bn_name(node), reason) for node, reason in inner_batch_norms(model)]
    bns = []
    for key, members in groups.items():
        mean, var = (constants.value(name) for name in key[MEAN - 1 :])
        if mean is None or var is None:
            raise RuntimeError(f"{key} are no constants")
        # Exporters keep equal tensors once, so that all batch norms of an untrained network seem to be one.
        is_untrained = not mean.any() and bool((var == 1).all())
        tied = [members] if not is_untrained else [[node] for node in members]
        bns += [_Bn(nodes, bn_name(nodes[0]), mean, var) for nodes in tied]
    return bns, skipped


def _observed(model: onnx.ModelProto, bns: list[_Bn]) -> onnx.ModelProto:
    """A copy whose batch norms normalize by the batch, and whose outputs are the statistics of each of their calls:
    mean and biased variance in float64, and how many values they are of."""
    observed = copy.deepcopy(model)
    graph = observed.graph
    by_output = {node.output[0]: node for node in graph.node}
    added, outputs = {}, []
    for bn in bns:
        for original in bn.nodes:
            node = by_output[original.output[0]]
            prefix = f"bnre_exp.{node.output[0]}"
            nodes, names = _statistics(prefix, node.input[0], bn.mean.size, opset_of(model))
            for index, name, kind in ((MEAN, names[0], bn.mean.dtype), (VAR, names[1], bn.var.dtype)):
                cast = helper.make_node(
                    "Cast", [name], [f"{name}.cast"], to=helper.np_dtype_to_tensor_dtype(np.dtype(kind))
                )
                nodes.append(cast)
                node.input[index] = cast.output[0]
            added[node.output[0]] = nodes
            kinds = (TensorProto.DOUBLE, TensorProto.DOUBLE, TensorProto.INT64)
            outputs += [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, kinds)]
    ordered = []
    for node in graph.node:
        ordered += [*added.get(node.output[0] if node.output else "", ()), node]
    del graph.node[:], graph.output[:]
    graph.node.extend(ordered)
    graph.output.extend(outputs)
    return observed


def _statistics(prefix: str, x: str, channels: int, opset: int) -> tuple[list[onnx.NodeProto], tuple[str, str, str]]:
    """Nodes that give mean, biased variance (``[C]``, float64) and the number of values of ``x`` ``[N, C, ...]``."""
    nodes: list[onnx.NodeProto] = []

    def add(kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"{prefix}.{name}"], **attributes))
        return f"{prefix}.{name}"

    def constant(name: str, values: Sequence[int]) -> str:
        return add("Constant", (), name, value=numpy_helper.from_array(np.array(values, np.int64)))

    def mean_of(value: str, name: str) -> str:
        if opset >= 18:
            return add("ReduceMean", (value, constant(f"{name}.axes", [0, 2])), name, keepdims=0)
        return add("ReduceMean", (value,), name, axes=[0, 2], keepdims=0)

    wide = add("Cast", (x,), "double", to=TensorProto.DOUBLE)
    rows = add("Reshape", (wide, constant("rows.shape", [0, channels, -1])), "rows")
    mean = mean_of(rows, "mean")
    column = add("Reshape", (mean, constant("column.shape", [1, channels, 1])), "column")
    centred = add("Sub", (rows, column), "centred")
    var = mean_of(add("Mul", (centred, centred), "square"), "var")
    return nodes, (mean, var, add("Size", (x,), "size"))


def _take_in(results: Sequence[Any], bns: list[_Bn], estimators: list[Estimator]) -> None:
    values = iter(results)
    for bn, estimator in zip(bns, estimators):
        for node in bn.nodes:
            mean, var, size = next(values), next(values), int(next(values))
            count = size // bn.mean.size
            check_count(bn_name(node), count)
            estimator.add(torch.from_numpy(mean), torch.from_numpy(var) * (count / (count - 1)), count)


def _write(model: onnx.ModelProto, bn: _Bn, statistics: Statistics) -> Callable[[], None]:
    """Put statistics in place of the old ones; returns what takes that back."""
    with ExitStack() as undo:
        for index, old, values in ((MEAN, bn.mean, statistics[0]), (VAR, bn.var, statistics[1])):
            undo.callback(_write_tensor(model, bn, index, values.numpy().astype(old.dtype)))
        return undo.pop_all().close


def _write_tensor(model: onnx.ModelProto, bn: _Bn, index: int, values: np.ndarray) -> Callable[[], Any]:
    """Put new values in place of the old, under the old name unless something else reads that, too; returns what
    takes that back."""
    graph = model.graph
    constants, old = constants_of(graph), bn.nodes[0].input[index]
    own = {id(node) for node in bn.nodes}
    is_shared = any(id(node) not in own or where != index for node, where in constants.readers[old])
    is_shared = is_shared or old in {output.name for output in graph.output}
    if old in constants.tensors and not is_shared and {node.input[index] for node in bn.nodes} == {old}:
        tensor = constants.tensors[old]
        before = copy.deepcopy(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return lambda: tensor.CopyFrom(before)
    name = unique(f"{bn.nodes[0].output[0]}_{'running_mean' if index == MEAN else 'running_var'}", names_of(graph))
    graph.initializer.append(numpy_helper.from_array(values, name))
    if model.ir_version < 4:  # an initializer was an input as well
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        graph.input.append(helper.make_tensor_value_info(name, kind, values.shape))
    olds = [node.input[index] for node in bn.nodes]
    for node in bn.nodes:
        node.input[index] = name

    def restore() -> None:
        for node, original in zip(bn.nodes, olds):
            node.input[index] = original
        for items in (graph.initializer, graph.input):
            for item in [item for item in items if item.name == name]:
                items.remove(item)

    return restore
