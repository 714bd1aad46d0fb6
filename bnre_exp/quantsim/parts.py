"""Networks of which only parts are simulated, which are put back in a copy of the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from bnre_exp.errors import UserError, few, first_line
from bnre_exp.quantsim.quantizers.scheme import LayerRule, QuantScheme
from bnre_exp.quantsim.wrappers import copied

PARTS = "bnre_exp_parts"  # attribute of the whole network: the path of each part's graph, by the name that was given
Build = Callable[[str, nn.Module, tuple[Tensor, ...]], fx.GraphModule]


class Part(nn.Module):
    """A part of a network: its graph, called with the tensors among the part's arguments.

    ``constants``: what else was among them, by place; they have to stay the same. ``original``: the part as it was,
    without its parameters, for whatever else the network asks of it, such as the computation of a loss.
    """

    def __init__(
        self, network: nn.Module, structure: TreeSpec, constants: Mapping[int, Any], original: nn.Module
    ) -> None:
        super().__init__()
        self.network, self.structure, self.constants = network, structure, dict(constants)
        self.__dict__["original"] = original  # no submodule: it has no state of its own

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" in self.__dict__ and not name.startswith("__"):
                return getattr(self.__dict__["original"], name)
            raise

    def train(self, mode: bool = True) -> Part:
        super().train(mode)
        self.__dict__["original"].train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for place, leaf in enumerate(leaves) if place not in self.constants]
        same = structure == self.structure and all(leaves[place] == value for place, value in self.constants.items())
        if not same or not all(isinstance(leaf, Tensor) for leaf in tensors):
            raise UserError(
                "A part of the network is called with other arguments than those that it was quantized for: expected "
                f"{self.structure}, got {structure}."
            )
        return self.network(*tensors)


def _without_parameters(part: nn.Module) -> nn.Module:
    """A copy whose parameters have no values: nothing can be computed with them any more."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in part.parameters()
    }
    return copy.deepcopy(part, memo)


def parts_of(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The graphs of the parts of a network that is simulated in parts, by the names of these; none of any other."""
    paths: Mapping[str, str] = getattr(model, PARTS, {})
    return {name: model.get_submodule(path) for name, path in paths.items()}  # type: ignore[misc]


def with_parts(model: nn.Module, change: Callable[[str, fx.GraphModule], nn.Module]) -> nn.Module:
    """A copy of a network that is simulated in parts, with what ``change(name, graph)`` makes of each."""
    whole = copy.deepcopy(model)
    for name, path in getattr(whole, PARTS).items():
        whole.set_submodule(path, change(name, whole.get_submodule(path)))  # type: ignore[arg-type]
    return whole


def named(part: str, name: str) -> str:
    """How something in a part is called in the whole network."""
    return f"{part}.{name}" if part else name


def by_parts(model: nn.Module, example_input: Any, names: Sequence[str], build: Build) -> nn.Module:
    """A copy of the network in which ``build(name, part, tensors)`` has replaced each part by a graph; the tensors are
    those that the part is called with on the example.

    Raises ``UserError`` for names that are no modules, are within each other, are not called, or are called with no
    tensors.
    """
    whole = copied(model)
    _check_names(whole, names)
    calls = _captured(whole, example_input, names)
    paths = {}
    for name in names:
        leaves, structure = tree_flatten(calls[name])
        constants = {place: leaf for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        if not tensors:
            raise UserError(f"submodules: {name} is called without tensors.")
        part = whole.get_submodule(name)
        original, is_plain = _without_parameters(part), structure == tree_flatten(((leaves[0],), {}))[1]
        graph = build(name, part if is_plain else _flattened(part, structure, constants), tensors)
        whole.set_submodule(name, Part(graph, structure, constants, original))
        paths[name] = f"{name}.network"
    setattr(whole, PARTS, paths)
    return whole.train(model.training)


def put_back(model: nn.Module, parts: Mapping[str, tuple[nn.Module, TreeSpec, Mapping[int, Any]]]) -> nn.Module:
    """A copy of a network with graphs in place of its parts; with each graph, the structure of its arguments and the
    constants among them."""
    whole = copied(model)
    for name, (graph, structure, constants) in parts.items():
        whole.set_submodule(name, Part(graph, structure, constants, _without_parameters(whole.get_submodule(name))))
    setattr(whole, PARTS, {name: f"{name}.network" for name in parts})
    return whole


def inputs_of_parts(whole: nn.Module, example_input: Any) -> dict[str, tuple[Tensor, ...]]:
    """The tensors that the graph of each part is called with on an example of the whole network."""
    paths = getattr(whole, PARTS)
    modes = [(module, module.training) for module in whole.modules()]
    try:
        calls = _captured(whole, example_input, list(paths.values()))
    finally:
        for module, training in modes:
            module.training = training
    return {name: calls[path][0] for name, path in paths.items()}


def _check_names(whole: nn.Module, names: Sequence[str]) -> None:
    known = {name for name, _ in whole.named_modules() if name}
    unknown = [name for name in names if name not in known]
    if unknown:
        children = [name for name, _ in whole.named_children()]
        raise UserError(f"submodules: the network has no {few(unknown)}; at its top it has {', '.join(children)}.")
    within = [(a, b) for a in names for b in names if a.startswith(f"{b}.")]
    if within or len(set(names)) < len(names):
        what = f"{within[0][0]} is a part of {within[0][1]}" if within else "a name is given twice"
        raise UserError(f"submodules: {what}; give parts that have nothing in common.")


@torch.no_grad()
def _captured(whole: nn.Module, example_input: Any, names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """The arguments of the first call of each part, in evaluation mode."""
    calls, handles = dict[str, tuple[Any, Any]](), []
    for name in names:

        def capture(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls.setdefault(name, (args, kwargs))

        handles.append(whole.get_submodule(name).register_forward_pre_hook(capture, with_kwargs=True))
    whole.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            if isinstance(example_input, Mapping):
                whole(**example_input)
            else:
                whole(*(example_input if isinstance(example_input, tuple) else (example_input,)))
    except Exception as error:  # the user's code
        raise UserError(f"The network fails on the example in evaluation mode: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in calls]
    if missing:
        raise UserError(f"submodules: {few(missing)} is not called by the network in evaluation mode.")
    return calls


def _flattened(part: nn.Module, structure: TreeSpec, constants: Mapping[int, Any]) -> nn.Module:
    """The part itself, taking the tensors among its arguments one by one."""
    kind: Any = type(part)

    class Flattened(kind):  # type: ignore[misc]
        def forward(self, *tensors: Any) -> Any:
            given = iter(tensors)
            count = structure.num_leaves
            leaves = [constants[place] if place in constants else next(given) for place in range(count)]
            args, kwargs = tree_unflatten(leaves, structure)
            return kind.forward(self, *args, **kwargs)

    Flattened.__name__, Flattened.__qualname__, Flattened.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    part.__class__ = Flattened
    return part


def scheme_of_part(scheme: QuantScheme, name: str, part: nn.Module) -> QuantScheme:
    """The scheme with the overrides that concern a part, under the names that things have in it. A pattern begins with
    the name of a part, or with ``*``."""
    inner = [path for path, _ in part.named_modules() if path]
    rules = list[LayerRule]()
    for rule in scheme.overrides:
        if rule.pattern.startswith(f"{name}."):
            rules.append(replace(rule, pattern=rule.pattern.removeprefix(f"{name}.")))
        elif rule.pattern.startswith("*") and any(fnmatchcase(path, rule.pattern) for path in inner):
            rules.append(rule)
    return replace(scheme, overrides=tuple(rules))


def check_scheme(scheme: QuantScheme, names: Sequence[str]) -> None:
    """Raise ``UserError`` for what a scheme cannot ask of a network in parts."""
    if scheme.first_last_bits is not None:
        raise UserError(
            "first_last_bits: which layer of a network in parts is the first or the last is not known; name the layers "
            "in overrides."
        )
    lost = [rule.pattern for rule in scheme.overrides if not rule.pattern.startswith(("*", *(f"{n}." for n in names)))]
    if lost:
        raise UserError(
            f"overrides: {few(lost)} is in none of the parts {', '.join(names)}; a pattern begins with the name of a "
            "part, or with *."
        )


def leaves_of_part(leaf_modules: Sequence[str], name: str, part: nn.Module) -> list[str]:
    """The ``leaf_modules`` that are in a part, under the names that they have in it."""
    known = {path for path, _ in part.named_modules()} | {type(module).__name__ for module in part.modules()}
    return [inner for leaf in leaf_modules if (inner := leaf.removeprefix(f"{name}.")) in known]
