"""From a model to a torch.fx graph that behaves as the model does, in evaluation and in training mode."""

from __future__ import annotations

import copy
import inspect
import operator
import re
import traceback
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp.errors import UserError
from bnre_exp.quantsim.layout import LAYERS


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


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Sequence[str]) -> None:
        super().__init__()
        self.leaves = set(leaves)
        self.entered: list[str] = []
        self.names: dict[int, str] = {}

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if {qualified_name, type(module).__name__} & self.leaves:
            return True
        if isinstance(module, _BatchNorm) or super().is_leaf_module(module, qualified_name):
            return True
        holds_layers = any(isinstance(child, (*LAYERS, _BatchNorm)) for child in module.modules())
        return not holds_layers and reads_training(type(module))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.entered.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.entered.pop()
        return result


def reads_training(kind: type) -> bool:
    """Whether a method of the class, or of its bases below nn.Module, looks at ``self.training``."""

    def mentions(code: CodeType) -> bool:
        return "training" in code.co_names or any(mentions(c) for c in code.co_consts if isinstance(c, CodeType))

    own = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    functions = [value for base in own for value in vars(base).values() if inspect.isfunction(value)]
    return any(mentions(function.__code__) for function in functions if function.__name__ != "train")


def trace(model: nn.Module, leaf_modules: Sequence[str] = (), num_inputs: int = 1) -> fx.GraphModule:
    """A graph of a copy of ``model``: functional dropout follows the mode, in-place operations are made out-of-place.

    leaf_modules: names or class names of modules that are not looked into. num_inputs: how many inputs the model is
    called with; the others keep their defaults. Raises ``UserError`` naming the module and line that cannot be traced.
    """
    model = _without_sync_bn(copy.deepcopy(model)).eval()
    known = {name for name, _ in model.named_modules()} | {type(m).__name__ for m in model.modules()}
    unknown = [name for name in leaf_modules if name not in known]
    if unknown:
        raise UserError(f"leaf_modules: the network has no module or class named {', '.join(unknown)}.")
    tracer, defaults = _Tracer(leaf_modules), _defaults(model, num_inputs)
    try:
        graph = tracer.trace(model, concrete_args=defaults or None)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explain_failure(error, tracer, model)) from error
    traced = fx.GraphModule(tracer.root, graph, type(model).__name__)
    _drop_default_arguments(traced, defaults)
    _drop_identities(traced)
    _follow_mode(traced)
    _split_bn_activations(traced)
    _make_out_of_place(traced)
    traced.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output", "call_module"))
    traced.graph.lint()
    traced.recompile()
    return traced.eval()


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


def _without_sync_bn(model: nn.Module) -> nn.Module:
    """SyncBatchNorm becomes plain BN: the simulation runs in one process."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.SyncBatchNorm and name:
            model.set_submodule(name, _plain_bn(module))
    return model


def _defaults(model: nn.Module, num_inputs: int) -> dict[str, Any]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    rest = [p for p in parameters[num_inputs:] if p.default is not p.empty]
    simple = (type(None), bool, int, float, str)  # torch.fx keeps other defaults as they are
    return {p.name: p.default for p in rest if p.kind is not p.VAR_KEYWORD and isinstance(p.default, simple)}


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


def _explain_failure(error: Exception, tracer: _Tracer, model: nn.Module) -> str:
    library = ("/torch/fx/", "/torch/nn/modules/module.py", "/bnre_exp/quantsim/")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(part in f.filename for part in library)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "an unknown line"
    name = tracer.entered[-1] if tracer.entered else ""
    holder = model.get_submodule(name) if name else model
    what = (
        f"module {name!r} ({type(holder).__name__})" if name else f"the network's own forward ({type(model).__name__})"
    )
    way_out = (
        f"rewrite that line without control flow on tensors, or keep the module whole with leaf_modules=[{name!r}] "
        "(its weights and BNs are then left as they are)"
        if name
        else "rewrite that line without control flow on tensors, or move it into a submodule named in leaf_modules"
    )
    return f"torch.fx cannot trace {what}: {error}\n  at {where}\n  What to do: {way_out}."


def _follow_mode(traced: fx.GraphModule) -> None:
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
