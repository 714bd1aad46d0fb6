"""Networks of which only parts are simulated, which are put back in a copy of the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from bnre_exp.errors import UserError, few, first_line
from bnre_exp.quantsim.part import CONSTANTS, Call, Calling, Part
from bnre_exp.quantsim.tracing.frozen import MARK, frozen_modules
from bnre_exp.quantsim.whole import PARTS, named
from bnre_exp.quantsim.wrappers import copied, unwrapped

Inputs = tuple[Tensor, ...]
See = Callable[[str, Any, Any], Any]  # of a part's name, and what torch gives to a hook
Build = Callable[[str, nn.Module, Sequence[Inputs]], fx.GraphModule]


class Replaced(nn.Module):
    """What is left of a float part, or of a module in it, where the rest of the network holds on to it."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise UserError(
            "A module of a part that is simulated is called by the rest of the network, which holds it in a plain list "
            "or attribute; let it call the part, or name a larger part in submodules."
        )


def _without_parameters(part: nn.Module) -> nn.Module:
    """A copy whose parameters have no values: nothing can be computed with them any more."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in part.parameters()
    }
    return copy.deepcopy(part, memo)


def by_parts(model: nn.Module, example_input: Any, names: Sequence[str], build: Build) -> nn.Module:
    """A copy of the network in which ``build(name, part, calls)`` has replaced each part by a graph; each of the calls
    is the tensors that the part is called with on the example.

    Raises ``UserError`` for names that are no modules, are within each other, are not called, or are called with no
    tensors or in several ways, and for parts that share tensors with each other or with the rest.
    """
    whole = copied(model)
    check_names(whole, names)
    _check_apart(whole, names)
    calls, kinds = _captured(whole, example_input, names)
    modules, paths = dict(whole.named_modules()), {}
    for name in (n for n in frozen_modules(whole) if any(n.startswith(f"{part}.") for part in names)):
        modules[name].training = False
        setattr(modules[name], MARK, True)  # tracing looks at each part alone
    for name in names:
        calling, inputs = _one_way(name, calls[name], kinds[name])
        part = whole.get_submodule(name)
        original, is_plain = _without_parameters(part), calling.structure == tree_flatten(((inputs[0][0],), {}))[1]
        graph = build(name, part if is_plain else _flattened(unwrapped(part), calling), inputs)
        whole.set_submodule(name, Part(graph, calling, original))
        paths[name] = f"{name}.network"
        for module in part.modules():
            module.__class__ = Replaced
    setattr(whole, PARTS, paths)
    return whole


def put_back(model: nn.Module, parts: Mapping[str, tuple[nn.Module, Calling]]) -> nn.Module:
    """A copy of a network with graphs, which are called so, in place of its parts."""
    whole = copied(model)
    for name, (graph, calling) in parts.items():
        whole.set_submodule(name, Part(graph, calling, _without_parameters(whole.get_submodule(name))))
    setattr(whole, PARTS, {name: f"{name}.network" for name in parts})
    return whole


def inputs_of_parts(whole: nn.Module, example_input: Any) -> dict[str, Inputs]:
    """The tensors that the graph of each part is first called with on an example of the whole network."""
    paths = getattr(whole, PARTS)
    calls, _ = _captured(whole, example_input, list(paths.values()))
    return {name: tuple(calls[path][0][0]) for name, path in paths.items()}


def check_names(whole: nn.Module, names: Sequence[str]) -> None:
    """Raise ``UserError`` unless these are names of modules that have nothing in common."""
    known = {name for name, _ in whole.named_modules(remove_duplicate=False) if name}
    unknown = [repr(name) for name in names if name not in known]
    if unknown:
        children = [name for name, _ in whole.named_children()]
        raise UserError(f"submodules: the network has no {few(unknown)}; at its top it has {', '.join(children)}.")
    within = [(a, b) for a in names for b in names if a.startswith(f"{b}.")]
    if within or len(set(names)) < len(names):
        what = f"{within[0][0]} is a part of {within[0][1]}" if within else "a name is given twice"
        raise UserError(f"submodules: {what}; give parts that have nothing in common.")


def _check_apart(whole: nn.Module, names: Sequence[str]) -> None:
    """Raise ``UserError`` for a part that is, or shares a tensor with, something outside of it: its graph has its own
    copies of its tensors, which training and re-estimation change."""
    parts, seen = {id(whole.get_submodule(name)): name for name in names}, dict[int, tuple[str, str]]()
    for path, module in whole.named_modules(remove_duplicate=False):
        inside = next((name for name in names if f"{path}.".startswith(f"{name}.")), "")
        if isinstance(module, Part):
            raise UserError(f"quantize: {path} is simulated already; give the network that it was made from.")
        if id(module) in parts and path not in names:
            raise UserError(f"submodules: {parts[id(module)]} is also the network's {path}; a part has one place.")
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            full = named(path, key)
            other, other_name = seen.setdefault(id(tensor), (inside, full)) if tensor is not None else (inside, full)
            if other != inside:
                raise UserError(
                    f"submodules: {other_name} and {full} are the same tensor, in {other or 'the rest of the network'} "
                    f"and in {inside or 'the rest of the network'}; name one part that holds both, or untie them."
                )


def _captured(
    whole: nn.Module, example_input: Any, names: Sequence[str]
) -> tuple[dict[str, list[Call]], dict[str, type]]:
    """The arguments of all calls of each part, in evaluation mode, and the class of what it gives.

    Raises ``UserError`` where the network fails, does not call a part, or reads what a part has changed in place, which
    its graph does not do."""
    calls, kinds, before, changed = dict[str, list[Call]](), dict[str, type](), dict[str, list[Any]](), set[str]()

    def enter(name: str, args: Any, kwargs: Any) -> Any:
        before[name] = [(x, x._version) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        calls.setdefault(name, []).append(tree_flatten(_cloned((args, kwargs))))

    def leave(name: str, _: Any, output: Any) -> None:
        kinds[name] = type(output)
        changed.update({name} if any(x._version != version for x, version in before.pop(name)) else ())

    expected = _run(whole, example_input, names, enter, leave)
    if missing := [name for name in names if name not in calls]:
        raise UserError(f"submodules: {few(missing)} is not called by the network in evaluation mode.")
    for name in sorted(changed):
        found = _run(whole, example_input, [name], lambda _, *given: _cloned(given), lambda *_: None)
        pairs = [pair for pair in zip(tree_leaves(expected), tree_leaves(found)) if isinstance(pair[0], Tensor)]
        if not all(a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in pairs):
            raise UserError(
                f"submodules: {name} changes what it is given in place, and the network reads that afterwards; let it "
                "make a new tensor (as with inplace=False), or name a part that holds both."
            )
    return calls, kinds


def _cloned(values: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, values)


@torch.no_grad()
def _run(whole: nn.Module, example_input: Any, names: Sequence[str], enter: See, leave: See) -> Any:
    """What the network gives for the example, in evaluation mode; modes are as before then. enter: sees the arguments
    of each call of a part, and may replace them; leave: sees what the part gives."""
    modes, handles = [(module, module.training) for module in whole.modules()], []
    for name in names:
        part = whole.get_submodule(name)
        before, after = partial(_called, enter, name), partial(_called, leave, name)
        handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(part.register_forward_hook(after))
    whole.eval()
    example = _cloned(example_input)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            if isinstance(example, Mapping):
                return whole(**example)
            return whole(*(example if isinstance(example, tuple) else (example,)))
    except Exception as error:  # the user's code
        raise UserError(f"The network fails on the example in evaluation mode: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def _called(see: Callable[..., Any], name: str, _: nn.Module, *seen: Any) -> Any:
    return see(name, *seen)


def _one_way(name: str, calls: Sequence[Call], kind: type) -> tuple[Calling, list[Inputs]]:
    """How a part is called, and the tensors of all calls, those of each shape once.

    Raises ``UserError`` where the calls differ in more than tensors, and for arguments that are neither those nor
    constants."""
    leaves, structure = calls[0]
    constants = {place: leaf for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    for value in constants.values():
        if not isinstance(value, CONSTANTS):
            raise UserError(
                f"submodules: {name} is called with a {type(value).__name__}; expected tensors, in tuples, lists and "
                "dicts, and constants such as numbers. Name the parts that it consists of."
            )
    if len(constants) == len(leaves):
        raise UserError(f"submodules: {name} is called without tensors.")
    calling = Calling(structure, constants, kind if issubclass(kind, dict) and kind is not dict else None)
    inputs = dict[Any, Inputs]()
    for call in calls:
        if why := calling.why_another(call):
            raise UserError(f"submodules: {name} is called in several ways: {why} Name the parts that it consists of.")
        tensors = tuple(leaf for leaf in call[0] if isinstance(leaf, Tensor))
        inputs.setdefault(tuple(x.shape for x in tensors), tensors)
    return calling, list(inputs.values())


def _flattened(part: nn.Module, calling: Calling) -> nn.Module:
    """The part itself, taking the tensors among its arguments one by one."""
    kind: Any = type(part)

    class Flattened(kind):  # type: ignore[misc]
        def forward(self, *tensors: Any) -> Any:
            given, constants = iter(tensors), calling.constants
            count = calling.structure.num_leaves
            leaves = [constants[place] if place in constants else next(given) for place in range(count)]
            args, kwargs = tree_unflatten(leaves, calling.structure)
            return kind.forward(self, *args, **kwargs)

    Flattened.__name__, Flattened.__qualname__, Flattened.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    part.__class__ = Flattened
    return part
