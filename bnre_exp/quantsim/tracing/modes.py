"""Networks that compute something else in training mode: a second graph, over the modules of the first."""

from __future__ import annotations

import inspect
from collections import defaultdict
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, LAYERS
from bnre_exp.quantsim.tracing.metadata import is_metadata

COUNTERPART = "counterpart"  # in meta of a node of the training graph: the name of its node in the evaluation graph
AFTER_NETWORK = "is_after_network"  # in meta of a node of the evaluation graph
_FOLLOWS_MODE = ("training", "inplace")  # arguments of functions that differ between modes and mean the same step


def adopt(network: fx.GraphModule, graph: fx.Graph, root: nn.Module) -> None:
    """Make ``graph``, traced from ``root`` in training mode, one over the modules and tensors of ``network``; both are
    changed in place. root: a copy of the network that ``network`` was traced from."""
    graph.owning_module = network
    moved: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "call_module" and not _has(network, str(node.target)):
            network.add_submodule(str(node.target), root.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            target = str(node.target)
            if target not in moved:
                moved[target] = _adopted_tensor(network, target, attrgetter(target)(root))
            node.target = moved[target]


def match(evaluation: fx.Graph, training: fx.Graph) -> None:
    """Write into the ``meta`` of the training graph's nodes which node of the evaluation graph does the same step.

    That is a call of the same function or module with the same operands; of a layer with weights or BN, the call of the
    same number. What training puts between two steps (a dropped path, noise) has no counterpart, and stands for what it
    is computed from.
    """
    unmatched: dict[str, list[fx.Node]] = defaultdict(list)
    calls: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in evaluation.nodes:
        unmatched[_key(node, {n: n.name for n in node.all_input_nodes})].append(node)
        if _is_weighted(node):
            calls[node.target].append(node)
    stands_for: dict[fx.Node, str] = {}
    count: dict[Any, int] = defaultdict(int)
    places = iter(evaluation.find_nodes(op="placeholder"))
    for node in training.nodes:
        found: fx.Node | None = None
        if node.op == "placeholder":
            found = next(places, None)
        elif _is_weighted(node):
            same, place = calls[node.target], count[node.target]
            count[node.target] += 1
            found = same[place] if place < len(same) else None
        elif node.op != "output":
            same = unmatched[_key(node, {n: stands_for.get(n, f"only {n.name}") for n in node.all_input_nodes})]
            found = same.pop(0) if same else None
        if found is not None:
            node.meta[COUNTERPART] = stands_for[node] = found.name
        elif not is_metadata(node):
            origins = {stands_for[n] for n in node.all_input_nodes if n in stands_for and not is_metadata(n)}
            if len(origins) == 1:
                stands_for[node] = origins.pop()


def where_they_part(evaluation: fx.Graph, training: fx.Graph) -> str | None:
    """The first module, of two matched graphs, that does in one mode what it does not in the other; in words."""
    for graph, other, mode in ((training, evaluation, "training"), (evaluation, training, "evaluation")):
        for node in _only_in(graph, other):
            owner, kind = _owner(node)
            what = f"the module {owner!r} ({kind})" if owner else "the network's own forward"
            return f"{what}, which computes {_call(node)} in {mode} mode only"
    return None


def mark_after_network(evaluation: fx.Graph, training: fx.Graph) -> None:
    """Mark what evaluation computes of the network's outputs in training mode, such as boxes of them: nodes without a
    counterpart that no layer reads which training has, too."""
    known = {str(node.target) for node in training.nodes if _is_weighted(node)}
    only, needed = set(_only_in(evaluation, training)), set[fx.Node]()
    for node in reversed(evaluation.nodes):
        if node in needed or (_is_weighted(node) and str(node.target) in known):
            needed.update([node, *node.all_input_nodes])
    for node in only - needed:
        if node.op.startswith("call_"):
            node.meta[AFTER_NETWORK] = True


def counterparts(graph: fx.Graph, name: str) -> list[fx.Node]:
    """The nodes of a training graph whose counterpart is the node of that name."""
    return [node for node in graph.nodes if node.meta.get(COUNTERPART) == name]


def _only_in(graph: fx.Graph, other: fx.Graph) -> list[fx.Node]:
    """Nodes that compute values and have no counterpart in the other graph, which is matched with this one."""
    matched = {node.meta.get(COUNTERPART) for node in other.nodes}
    return [
        node
        for node in graph.nodes
        if node.op.startswith("call_") and not is_metadata(node) and node.name not in matched
        and COUNTERPART not in node.meta
    ]  # fmt: skip


def _key(node: fx.Node, names: dict[fx.Node, Any]) -> str:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _Name(names[n]))
    target = node.target if node.op != "get_attr" else f"tensor {node.target}"
    if node.op == "call_function" and "training" in _parameters(node.target):
        bound = inspect.signature(node.target).bind(*args, **kwargs)  # type: ignore[arg-type]
        bound.apply_defaults()
        args, kwargs = (), {k: v for k, v in bound.arguments.items() if k not in _FOLLOWS_MODE}
    return repr((node.op, target, args, kwargs))


class _Name(str):
    """The name of a node within arguments, told from a string that is an argument."""

    def __repr__(self) -> str:
        return f"<{self}>"


def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of a built-in
        return ()


def _is_weighted(node: fx.Node) -> bool:
    if node.op != "call_module" or node.graph.owning_module is None:
        return False
    module = node.graph.owning_module.get_submodule(str(node.target))
    return any(isinstance(part, (*LAYERS, *BATCH_NORMS)) for part in module.modules())


def _owner(node: fx.Node) -> tuple[str, str]:
    """Name and class of the module whose forward makes the call."""
    stack = node.meta.get("nn_module_stack") or {}
    levels = [(name, kind) for name, kind in stack.values() if name != str(node.target)]
    name, kind = levels[-1] if levels else ("", None)
    return name, getattr(kind, "__name__", str(kind))


def _call(node: fx.Node) -> str:
    return str(node.target) if node.op != "call_function" else getattr(node.target, "__name__", str(node.target))


def _has(root: nn.Module, target: str) -> bool:
    try:
        attrgetter(target)(root)
    except AttributeError:
        return False
    return True


def _adopted_tensor(network: fx.GraphModule, target: str, value: Any) -> str:
    """The name under which the network has a tensor of the same values, which is added where it has none."""
    if _has(network, target) and _is_equal(attrgetter(target)(network), value):
        return target
    owner, _, name = target.rpartition(".")
    if not owner and isinstance(value, Tensor):  # constants of the tracer are numbered anew in each tracing
        for own, buffer in network.named_buffers(recurse=False):
            if own.startswith("_tensor_constant") and _is_equal(buffer, value):
                return own
    if owner and _has(network, owner) and not _has(network, target):
        parent = network.get_submodule(owner)
        if isinstance(value, nn.Parameter):
            parent.register_parameter(name, value)
        else:
            parent.register_buffer(name, value, persistent=False)
        return target
    new = f"{target.replace('.', '_')}_in_training"
    if _has(network, new) or not isinstance(value, Tensor):
        raise UserError(f"The network reads {target}, which is another tensor in training mode; this is not supported.")
    network.register_buffer(new, value, persistent=False)
    return new


def _is_equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
