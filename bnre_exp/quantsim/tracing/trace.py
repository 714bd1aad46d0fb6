"""From a model to a torch.fx graph that behaves as the model does, in evaluation and in training mode."""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, LAYERS
from bnre_exp.quantsim.tracing.frozen import META, frozen_modules
from bnre_exp.quantsim.tracing.functional import replace_calls
from bnre_exp.quantsim.tracing.network import TracedNetwork
from bnre_exp.quantsim.tracing.subclasses import make_plain
from bnre_exp.quantsim.tracing.tracer import Tracer, check_decision, explain_failure, mentions, reads_training
from bnre_exp.quantsim.wrappers import copied


class FollowTraining(nn.Module):
    """Calls a function with ``training=self.training``: what tracing would have frozen to one mode."""

    FUNCTIONS: dict[str, Callable[..., Any]] = {
        name: getattr(F, name)
        for name in (
            "dropout",
            "dropout1d",
            "dropout2d",
            "dropout3d",
            "alpha_dropout",
            "feature_alpha_dropout",
            "rrelu",
        )
    }

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.FUNCTIONS[self.function](*args, training=self.training, **kwargs)

    def extra_repr(self) -> str:
        return self.function


def trace(
    model: nn.Module, examples: Sequence[Tensor], leaf_modules: Sequence[str] = ()
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A graph of a copy of ``model``: functional dropout follows the mode, in-place operations are made out-of-place.

    examples: the inputs that the model is called with, ``[N, ...]`` each; other arguments keep their defaults.
    leaf_modules: names or class names of modules that are not looked into.

    Also returns the source lines whose control flow depends on the examples' size (not that of the batch); the graph
    refuses inputs with which they take another course. Raises ``UserError`` naming the module and line that cannot be
    traced.
    """
    frozen = frozen_modules(model)
    known = {name for name, _ in model.named_modules()} | {type(m).__name__ for m in model.modules()}
    model = copied(model)
    model.eval()
    for name, module in model.named_modules():
        if type(module) is nn.SyncBatchNorm:  # the simulation runs in one process
            module.__class__ = BatchNormNd  # type: ignore[assignment]
        elif isinstance(module, LAYERS) and not {name, type(module).__name__} & set(leaf_modules):
            make_plain(module)
    unknown = [name for name in leaf_modules if name not in known]
    if unknown:
        raise UserError(f"leaf_modules: the network has no module or class named {', '.join(unknown)}.")
    tracer, defaults = Tracer(leaf_modules, examples, _is_kept_whole), _defaults(model, len(examples))
    try:
        graph = tracer.trace(model, concrete_args=defaults or None)
    except UserError:
        raise
    except Exception as error:
        raise explain_failure(error, tracer, model) from error
    traced = TracedNetwork(tracer.root, graph, type(model).__name__)
    _drop_default_arguments(traced, defaults)
    _first_by_place(traced)
    _drop_identities(traced)
    trained = functools.partial(_trained_graph, model, examples, leaf_modules, defaults)
    frozen |= set(replace_calls(traced, type(model), trained, _new_module))
    frozen |= _follow_mode(traced, frozen)
    _split_bn_activations(traced)
    _make_out_of_place(traced)
    traced.graph.eliminate_dead_code(is_impure_node=_must_stay)
    traced.graph.lint()
    traced.recompile()
    traced.meta[META] = frozen
    return traced.eval(), tuple(tracer.decisions)


def _trained_graph(
    model: nn.Module, examples: Sequence[Tensor], leaf_modules: Sequence[str], defaults: dict[str, Any]
) -> fx.Graph | None:
    """The network traced in training mode, None where that fails."""
    try:
        tracer = Tracer(leaf_modules, examples, _is_kept_whole)
        trained = copied(model)
        trained.train()
        return tracer.trace(trained, concrete_args=defaults or None)
    except Exception:  # a forward of someone else's can fail in any way
        return None


def _must_stay(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output", "call_module") or node.target is check_decision


def _is_kept_whole(module: nn.Module) -> bool:
    """Whether a module without layers or BNs acts by the mode, which tracing would freeze."""
    holds_layers = any(isinstance(child, (*LAYERS, *BATCH_NORMS)) for child in module.modules())
    return not holds_layers and reads_training(type(module)) and not mentions(type(module), "batch_norm")


class BatchNormNd(nn.BatchNorm2d):
    """BN over axis 1 of an input of any dimension from 2: what SyncBatchNorm is in a single process."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.dim()}")


def _plain_bn(module: _BatchNorm) -> BatchNormNd:
    """A plain BN that shares the parameters and buffers of a subclass."""
    plain = BatchNormNd(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    plain.weight, plain.bias = module.weight, module.bias
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        plain._buffers[name] = getattr(module, name)
    return plain.train(module.training)


def _defaults(model: nn.Module, num_inputs: int) -> dict[str, Any]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    rest = [p for p in parameters[num_inputs:] if p.default is not p.empty]
    simple = (type(None), bool, int, float, str)  # torch.fx keeps other defaults as they are
    return {p.name: p.default for p in rest if p.kind is not p.VAR_KEYWORD and isinstance(p.default, simple)}


def _first_by_place(traced: fx.GraphModule) -> None:
    """``self.bn(input=x)`` becomes ``self.bn(x)``."""
    for node in traced.graph.nodes:
        if node.op == "call_module" and not node.args and list(node.kwargs) == ["input"]:
            node.args, node.kwargs = (node.kwargs["input"],), {}


def _drop_identities(traced: fx.GraphModule) -> None:
    """nn.Identity, where a layer was switched off, would keep a conv and its BN or activation apart."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and type(traced.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _drop_default_arguments(traced: fx.GraphModule, defaults: dict[str, Any]) -> None:
    """torch.fx leaves a placeholder and an assertion for every argument that was fixed to its default."""
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") in ("_assert_is_none", "_assert"):
            condition = node.args[0]
            traced.graph.erase_node(node)
            if isinstance(condition, fx.Node) and condition.op == "call_function" and not condition.users:
                traced.graph.erase_node(condition)
    for node in traced.graph.find_nodes(op="placeholder"):
        if not node.users and any(re.fullmatch(rf"{re.escape(name)}(_\d+)?", str(node.target)) for name in defaults):
            traced.graph.erase_node(node)


def _follow_mode(traced: fx.GraphModule, frozen: frozenset[str]) -> frozenset[str]:
    """Returns names of the new modules that belong to modules in ``frozen``."""
    made = set()
    for node in list(traced.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or FollowTraining.FUNCTIONS.get(name) is not node.target:
            continue
        bound = inspect.signature(FollowTraining.FUNCTIONS[name]).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        arguments = {**bound.arguments, "inplace": False}
        if arguments.pop("training"):
            continue  # on in evaluation mode too (Monte Carlo dropout): the mode does not matter
        module_name = _new_module(traced, f"{node.name}_follows_mode", FollowTraining(name))
        with traced.graph.inserting_after(node):
            first = arguments.pop("input")
            new = traced.graph.call_module(module_name, (first,), arguments)
        node.replace_all_uses_with(new)
        traced.graph.erase_node(node)
        owner, _ = next(reversed((node.meta.get("nn_module_stack") or {"": ("", None)}).values()))
        made |= {module_name} if owner in frozen else set()
    return frozenset(made)


def _new_module(traced: fx.GraphModule, name: str, module: nn.Module) -> str:
    if hasattr(traced, name):
        raise UserError(f"The network has a module named {name!r}, a name that the quantization needs; rename it.")
    traced.add_submodule(name, module)
    return name


_INPLACE_OPERATORS = {
    name: name[1:] if name not in ("iand", "ior") else name[1:] + "_"
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "imatmul", "iand", "ior")
}


def _make_out_of_place(traced: fx.GraphModule) -> None:
    """Later readers of a tensor that was changed in place read the result instead; the values stay the same."""
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        changed = False
        if node.op == "call_module":
            module = traced.get_submodule(node.target)
            if getattr(module, "inplace", False):
                changed = True
        elif node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            plain = name[:-1] if name.endswith("_") and not name.startswith("_") else None
            if node.target is getattr(operator, name, None) and name in _INPLACE_OPERATORS:
                node.target, changed = getattr(operator, _INPLACE_OPERATORS[name]), True
            elif plain and (function := getattr(torch, plain, None) or getattr(F, plain, None)):
                node.target, changed = function, True
            if node.kwargs.get("inplace"):
                node.kwargs, changed = {**node.kwargs, "inplace": False}, True
        elif node.op == "call_method" and re.fullmatch(r"[a-z]\w*[a-z0-9]_", node.target):  # relu_, not __len__
            node.target, changed = node.target[:-1], True
        if changed and node.args and isinstance(node.args[0], fx.Node):
            _read_instead(node.args[0], node, order)
    for module in traced.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]


def _read_instead(changed: fx.Node, result: fx.Node, order: dict[fx.Node, int]) -> None:
    """All that read ``changed`` after ``result`` was computed read ``result``."""
    changed.replace_all_uses_with(result, lambda user: user is not result and order[user] > order[result])


def _split_bn_activations(traced: fx.GraphModule) -> None:
    """A BN subclass with a built-in dropout and activation (timm's) becomes a plain BN followed by these modules."""
    parts_of: dict[str, list[str]] = {}
    for node in list(traced.graph.nodes):
        if node.op != "call_module":
            continue
        if node.target not in parts_of:
            module = traced.get_submodule(node.target)
            if not (isinstance(module, _BatchNorm) and isinstance(getattr(module, "act", None), nn.Module)):
                continue
            traced.set_submodule(node.target, _plain_bn(module))
            parts = [(part, getattr(module, part, None)) for part in ("drop", "act")]
            parts_of[node.target] = [
                _new_module(traced, f"{node.target.replace('.', '_')}_{part}", child)
                for part, child in parts
                if isinstance(child, nn.Module) and not isinstance(child, nn.Identity)
            ]
        last = node
        for name in parts_of[node.target]:
            with traced.graph.inserting_after(last):
                new = traced.graph.call_module(name, ())
            last.replace_all_uses_with(new)
            new.args = (last,)
            last = new
