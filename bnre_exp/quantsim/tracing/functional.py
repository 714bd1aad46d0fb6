"""Batch norms that a network calls as functions: where all their tensors are the network's own, they become modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS
from bnre_exp.quantsim.tracing.words import mentions, reads_training

_OF_TORCH = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: tuple(inspect.signature(F.batch_norm).parameters),
    torch.batch_norm: _OF_TORCH,
    torch.ops.aten.batch_norm: _OF_TORCH,
    torch.ops.aten.batch_norm.default: _OF_TORCH,
}
_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
_TENSORS = ("running_mean", "running_var", "weight", "bias")


class FunctionalBatchNorm(nn.BatchNorm2d):
    """F.batch_norm as a module, over axis 1 of an input of any dimension from 2, with tensors of the network."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # the function looks at nothing but axis 1


def callers_of_batch_norm(model: nn.Module) -> tuple[str, ...]:
    """Names of modules, batch norms aside, whose code calls a function named batch_norm: F's, torch's or aten's."""
    others = {name: module for name, module in model.named_modules() if not isinstance(module, BATCH_NORMS)}
    found = {name: m for name, m in others.items() if mentions(type(m), "batch_norm") and not hasattr(m, "batch_norm")}
    return tuple(name or type(module).__name__ for name, module in found.items())


def is_call(node: fx.Node) -> bool:
    """Whether the node calls batch norm as a function."""
    return node.op == "call_function" and node.target in _ARGUMENTS


def why_function(node: fx.Node) -> str:
    """Why a call is left as it is."""
    arguments = _arguments(node)
    if arguments["training"] is not False:
        return "F.batch_norm that normalizes each batch by its own statistics"
    names = [name for name in _TENSORS if not _is_own(arguments[name])]
    if arguments["running_mean"] is None or arguments["running_var"] is None:
        return "F.batch_norm without running statistics"
    return f"F.batch_norm whose {', '.join(names) or 'eps or momentum'} is computed, or no tensor of the network's own"


def replace_calls(
    traced: fx.GraphModule,
    root: type,
    trained: Callable[[], fx.Graph | None],
    add: Callable[[fx.GraphModule, str, nn.Module], str],
) -> tuple[str, ...]:
    """Give each call of F.batch_norm a module with the very tensors it names; in place.

    root: class of the network; trained: gives the graph of the network traced in training mode, or None; add: puts a
    module into ``traced``. Returns the names of modules that normalize by running statistics in training mode, too.
    """
    calls = [node for node in traced.graph.nodes if is_call(node)]
    reads_mode = any(reads_training(_owner(node, root)) for node in calls)
    follows = _running_means_that_move(trained()) if reads_mode else set()
    made: dict[Any, str] = {}
    frozen = []
    for node in calls:
        arguments = _arguments(node)
        numbers = (arguments["momentum"], arguments["eps"])
        is_constant = all(isinstance(number, (int, float)) for number in numbers) and arguments["training"] is False
        has_statistics = arguments["running_mean"] is not None and arguments["running_var"] is not None
        if not (is_constant and has_statistics and all(_is_own(arguments[name]) for name in _TENSORS)):
            continue
        key = (*(str(getattr(arguments[name], "target", None)) for name in _TENSORS), numbers)
        if key not in made:
            made[key] = add(traced, f"{node.name}_module", _module(traced, arguments))
            is_moving = follows is None or arguments["running_mean"].target in follows
            frozen += [] if is_moving else [made[key]]
        with traced.graph.inserting_after(node):
            new = traced.graph.call_module(made[key], (arguments["input"],))
        node.replace_all_uses_with(new)
        traced.graph.erase_node(node)
    _drop_unread(traced, {name for key in made for name in key[:4]})
    return tuple(frozen)


def _arguments(node: fx.Node) -> dict[str, Any]:
    return {**_DEFAULTS, **dict(zip(_ARGUMENTS[node.target], node.args)), **node.kwargs}


def _owner(node: fx.Node, root: type) -> type:
    """The class of the module whose forward makes the call."""
    stack = node.meta.get("nn_module_stack") or {"": ("", root)}
    return next(reversed(stack.values()))[1]  # type: ignore[no-any-return]


def _is_own(value: Any) -> bool:
    return value is None or (isinstance(value, fx.Node) and value.op == "get_attr")


def _module(traced: fx.GraphModule, arguments: dict[str, Any]) -> nn.Module:
    values = {
        name: None if arguments[name] is None else attrgetter(arguments[name].target)(traced) for name in _TENSORS
    }
    channels = values["running_mean"].numel()  # type: ignore[union-attr]
    bn: Any = FunctionalBatchNorm(channels, eps=arguments["eps"], momentum=arguments["momentum"])
    for name, value in values.items():
        bn._parameters.pop(name, None)
        bn._buffers.pop(name, None)
        if isinstance(value, nn.Parameter) or value is None:
            bn.register_parameter(name, value)
        else:
            bn.register_buffer(name, value)
    return bn  # type: ignore[no-any-return]


def _running_means_that_move(graph: fx.Graph | None) -> set[Any] | None:
    """Running means of calls that normalize by the batch in training mode; None where that is not known."""
    if graph is None:
        return None
    calls = [_arguments(node) for node in graph.nodes if is_call(node)]
    return {call["running_mean"].target for call in calls if call["training"] and _is_own(call["running_mean"])}


def _drop_unread(traced: fx.GraphModule, targets: set[str]) -> None:
    """Tensors that only the calls read have another place now."""
    traced.graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
    read = {str(node.target) for node in traced.graph.find_nodes(op="get_attr")}
    for target in targets - read - {"None"}:
        owner, _, name = target.rpartition(".")
        delattr(traced.get_submodule(owner), name)
