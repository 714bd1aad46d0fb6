"""From a model to a torch.fx graph that behaves as the model does, in evaluation and in training mode."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, LAYERS
from bnre_exp.quantsim.tracing.caches import forget_seen_sizes
from bnre_exp.quantsim.tracing.frozen import META, frozen_modules, set_mode
from bnre_exp.quantsim.tracing.functional import is_call, replace_calls
from bnre_exp.quantsim.tracing.in_place import make_out_of_place
from bnre_exp.quantsim.tracing.modes import adopt, mark_after_network, match
from bnre_exp.quantsim.tracing.network import TracedNetwork
from bnre_exp.quantsim.tracing.subclasses import make_plain
from bnre_exp.quantsim.tracing.tracer import Tracer, check_decision, explain_failure
from bnre_exp.quantsim.tracing.words import mentions, reads_training
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
    model: nn.Module, examples: Sequence[Tensor], leaf_modules: Sequence[str] = (), by_mode: bool = False
) -> tuple[TracedNetwork, tuple[str, ...]]:
    """A graph of a copy of ``model``: functional dropout follows the mode, in-place operations are made out-of-place.

    examples: the inputs that the model is called with, ``[N, ...]`` each; other arguments keep their defaults.
    leaf_modules: names or class names of modules that are not looked into. by_mode: training mode gets a graph of its
    own, which is traced in that mode; else one graph is that of both.

    Also returns the source lines whose control flow depends on the examples' size (not that of the batch); the graph
    refuses inputs with which they take another course. Raises ``UserError`` naming the module and line that cannot be
    traced.
    """
    frozen = frozen_modules(model)
    known = {name for name, _ in model.named_modules()} | {type(m).__name__ for m in model.modules()}
    unknown = [name for name in leaf_modules if name not in known]
    if unknown:
        raise UserError(f"leaf_modules: the network has no module or class named {', '.join(unknown)}.")
    plain, model = model, _prepared(model, examples, leaf_modules)
    tracer = Tracer(leaf_modules, examples, _is_kept_whole)
    try:
        graph = tracer.trace(model)
    except UserError:
        raise
    except Exception as error:
        raise explain_failure(error, tracer, model) from error
    traced = TracedNetwork(tracer.root, graph, type(model).__name__)
    trained = functools.partial(_in_training, plain, examples, leaf_modules, frozen)
    if by_mode:
        _add_training_graph(traced, trained())
    _first_by_place(traced)
    _drop_identities(traced)
    frozen |= set(replace_calls(traced, type(model), lambda: _graph_or_none(trained), _new_module))
    _split_bn_activations(traced)
    make_out_of_place(traced)
    for each in traced.graphs:
        each.eliminate_dead_code(is_impure_node=_must_stay)
    if traced.training_graph is not None:
        match(traced.graph, traced.training_graph)
        mark_after_network(traced.graph, traced.training_graph)
    frozen |= _follow_mode(traced, frozen)
    for each in traced.graphs:
        each.lint()
    traced.recompile()
    traced.meta[META] = frozen
    return traced.eval(), tuple(tracer.decisions)


def _prepared(model: nn.Module, examples: Sequence[Tensor], leaf_modules: Sequence[str]) -> nn.Module:
    """A copy in evaluation mode that has seen no input, in which layers that are plain have their plain class."""
    model = copied(model)
    forget_seen_sizes(model, examples)
    model.eval()
    for name, module in model.named_modules():
        if type(module) is nn.SyncBatchNorm:  # the simulation runs in one process
            module.__class__ = BatchNormNd  # type: ignore[assignment]
        elif isinstance(module, LAYERS) and not {name, type(module).__name__} & set(leaf_modules):
            make_plain(module)
            _forget_old_padding(module)
    return model


def _forget_old_padding(layer: Any) -> None:
    """A conv keeps its padding in another order, too, which torch reads for padding other than zeros only. Where
    someone has set ``conv.padding`` since, that tells of the old one."""
    if isinstance(getattr(layer, "padding", None), tuple) and layer.padding_mode == "zeros":
        layer._reversed_padding_repeated_twice = tuple(size for size in reversed(layer.padding) for _ in range(2))


Traced = tuple[nn.Module, fx.Graph]


def _in_training(
    model: nn.Module, examples: Sequence[Tensor], leaf_modules: Sequence[str], frozen: frozenset[str]
) -> Traced:
    """The network traced in training mode, and the copy that was traced. Raises ``UserError`` if it cannot be."""
    tracer = Tracer(leaf_modules, examples, _is_kept_whole)
    trained = _prepared(model, examples, leaf_modules)
    set_mode(trained, True, frozen)
    try:
        return trained, tracer.trace(trained)
    except UserError:
        raise
    except Exception as error:  # a forward of someone else's can fail in any way
        raise explain_failure(error, tracer, trained) from error


def _graph_or_none(trained: Callable[[], Traced]) -> fx.Graph | None:
    try:
        return trained()[1]
    except UserError:
        return None


def _add_training_graph(traced: TracedNetwork, trained: Traced) -> None:
    root, graph = trained
    if any(is_call(node) for node in (*traced.graph.nodes, *graph.nodes)):
        raise UserError(
            "The network calls batch norm as a function, and does something else in training mode than in evaluation "
            "mode, which cannot be simulated together; make its batch norms modules."
        )
    adopt(traced, graph, root)
    traced.training_graph = graph


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


def _first_by_place(traced: TracedNetwork) -> None:
    """``self.bn(input=x)`` becomes ``self.bn(x)``."""
    for node in traced.all_nodes():
        if node.op == "call_module" and not node.args and list(node.kwargs) == ["input"]:
            node.args, node.kwargs = (node.kwargs["input"],), {}


def _drop_identities(traced: TracedNetwork) -> None:
    """nn.Identity, where a layer was switched off, would keep a conv and its BN or activation apart."""
    for node in traced.all_nodes():
        if node.op == "call_module" and type(traced.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            node.graph.erase_node(node)


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


def _split_bn_activations(traced: TracedNetwork) -> None:
    """A BN subclass with a built-in dropout and activation (timm's) becomes a plain BN followed by these modules."""
    parts_of: dict[str, list[str]] = {}
    for node in traced.all_nodes():
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
            with node.graph.inserting_after(last):
                new = node.graph.call_module(name, ())
            last.replace_all_uses_with(new)
            new.args = (last,)
            last = new
