"""Re-estimation of the statistics of an ONNX model's batch norms, undoable."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Optional

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from bnre_exp.errors import UserError
from bnre_exp.onnx.constants import Constants, all_nodes, attribute, bn_name, constants_of, opset_of
from bnre_exp.ort.session import feeds, open_session
from bnre_exp.progress import Progress, no_progress
from bnre_exp.stages.inputs import Passes, take_batches
from bnre_exp.stages.reestimate import METHODS, Estimator

OLDEST_OPSET = 9  # before, a batch norm could normalize every position by itself
MEAN, VAR = 3, 4  # inputs of a BatchNormalization node


@dataclass
class OnnxReestimationHandle:
    """Undoes a re-estimation: ``remove()``, or leaving a ``with`` block, puts the old statistics back.

    num_batches: batches used; passes: passes over the batches that they took; reestimated: names of the batch norms
    with new statistics; skipped: ``(name, reason)`` of the others.
    """

    num_batches: int
    passes: int
    reestimated: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    _model: onnx.ModelProto = field(repr=False)
    _before: Optional[onnx.GraphProto] = field(repr=False)

    def remove(self) -> None:
        """Restore the model of before. A second call does nothing."""
        if self._before is not None:
            self._model.graph.CopyFrom(self._before)
            self._before = None

    def __enter__(self) -> OnnxReestimationHandle:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.remove()


@dataclass
class _Bn:
    """Nodes that share statistics; one, unless the network calls a batch norm more than once."""

    nodes: list[onnx.NodeProto]
    mean: np.ndarray
    var: np.ndarray
    is_tied: bool

    @property
    def name(self) -> str:
        return bn_name(self.nodes[0])


def reestimate_bn_stats(
    model: onnx.ModelProto,
    batches: Iterable[Any],
    num_batches: int = 100,
    *,
    method: str = "batch_average",
    momentum: float = 0.1,
    providers: Optional[Sequence[str]] = None,
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
    if method not in METHODS:
        raise UserError(f"method={method!r}: expected one of {', '.join(METHODS)}.")
    if num_batches < 1:
        raise UserError(f"num_batches={num_batches}: expected at least 1.")
    if opset_of(model) < OLDEST_OPSET:
        raise UserError(
            f"The model has opset {opset_of(model)}; expected {OLDEST_OPSET} or higher "
            "(onnx.version_converter.convert_version brings it up)."
        )
    bns, skipped = _find(model.graph)
    if not bns:
        raise UserError(_nothing_to_do(skipped))
    estimators = [Estimator(method, momentum, torch.tensor(bn.mean), torch.tensor(bn.var)) for bn in bns]
    session = open_session(_observed(model, bns), providers)
    count = Passes()
    for batch in progress(take_batches(batches, num_batches, count), "re-estimate", num_batches):
        try:
            results = session.run(None, feeds(session, batch))
        except UserError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"ONNX Runtime cannot run the model on batch {count.batches}: {lines[0]}") from error
        _take_in(results, bns, estimators)
    after = [estimator.result(torch.float64) for estimator in estimators]
    bad = [bn.name for bn, (mean, var) in zip(bns, after) if not bool((mean.isfinite() & var.isfinite()).all())]
    if bad:
        raise UserError(
            f"Re-estimation gave statistics that are not finite for {', '.join(bad[:5])}"
            f"{' and others' if len(bad) > 5 else ''}; the old ones are kept. Look for NaN in the data or weights."
        )
    before = copy.deepcopy(model.graph)
    for bn, (mean, var) in zip(bns, after):
        _write(model.graph, bn, MEAN, mean.numpy().astype(bn.mean.dtype))
        _write(model.graph, bn, VAR, var.numpy().astype(bn.var.dtype))
    names = tuple(bn.name for bn in bns)
    return OnnxReestimationHandle(count.batches, count.passes, names, tuple(skipped), model, before)


def _nothing_to_do(skipped: list[tuple[str, str]]) -> str:
    if skipped:
        name, reason = skipped[0]
        return f"None of the model's {len(skipped)} batch norms can be re-estimated: {name} {reason}."
    return (
        "The model has no BatchNormalization operation. Exporters fold batch norm into the layers before it unless "
        "they are told not to (torch.onnx.export: optimize=False)."
    )


def _find(graph: onnx.GraphProto) -> tuple[list[_Bn], list[tuple[str, str]]]:
    """Batch norms whose statistics are constants, and why others are left out."""
    constants, skipped = constants_of(graph), []
    groups: dict[tuple[str, ...], list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        if attribute(node, "training_mode", 0):
            skipped.append((bn_name(node), "is in training mode: it normalizes each batch by its own statistics"))
        elif any(name not in constants.tensors for name in (node.input[MEAN], node.input[VAR])):
            skipped.append((bn_name(node), "has statistics that are computed, or inputs of the model"))
        else:
            groups.setdefault(tuple(node.input[1:]), []).append(node)
    inner = [node for node in _inner_nodes(graph) if node.op_type == "BatchNormalization"]
    skipped += [(bn_name(node), "is in the body of an If or Loop") for node in inner]
    bns = []
    for nodes in groups.values():
        mean, var = (_known(constants, nodes[0].input[index]) for index in (MEAN, VAR))
        # Exporters keep equal tensors once, so that all batch norms of an untrained network seem to be one.
        is_untrained = not mean.any() and bool((var == 1).all())
        is_tied = len(nodes) > 1 and not is_untrained
        bns += [_Bn(nodes, mean, var, True)] if is_tied else [_Bn([node], mean, var, False) for node in nodes]
    return bns, skipped


def _inner_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    own = {id(node) for node in graph.node}
    return [node for node in all_nodes(graph) if id(node) not in own]


def _known(constants: Constants, name: str) -> np.ndarray:
    value = constants.value(name)
    if value is None:
        raise RuntimeError(f"{name} is no constant")
    return value


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
            if count < 2:
                raise UserError(
                    f"The batch norm {bn_name(node)} gets a batch with one value per channel, which has no variance; "
                    "use larger batches."
                )
            estimator.add(torch.from_numpy(mean), torch.from_numpy(var) * (count / (count - 1)), count)


def _write(graph: onnx.GraphProto, bn: _Bn, index: int, values: np.ndarray) -> None:
    """Put new values in place of the old, under the old name unless something else reads that, too."""
    constants, old = constants_of(graph), bn.nodes[0].input[index]
    own = {id(node) for node in bn.nodes}
    is_shared = any(id(node) not in own or where != index for node, where in constants.readers[old])
    is_shared = is_shared or old in {output.name for output in graph.output}
    if not is_shared:
        tensor = constants.tensors[old]
        new = numpy_helper.from_array(values, tensor.name)
        tensor.CopyFrom(new)
        return
    taken = {*constants.tensors, *constants.readers, *(name for node in graph.node for name in node.output)}
    name = f"{bn.nodes[0].output[0]}_{'running_mean' if index == MEAN else 'running_var'}"
    while name in taken:
        name += "_"
    graph.initializer.append(numpy_helper.from_array(values, name))
    for node in bn.nodes:
        node.input[index] = name
