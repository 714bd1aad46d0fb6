"""What a network computes, told from any other by content: its traced graph with the constants in it, and all that its
modules hold besides parameters and buffers. Never an address, and the same in every process."""

from __future__ import annotations

import enum
import itertools
import types
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from bnre_exp.digests import digest, tensors_digest
from bnre_exp.jobs.code_identity import is_local
from bnre_exp.quantsim.tracing.trace import trace
from bnre_exp.quantsim.tracing.tracer import check_decision

PLAIN = (type(None), bool, int, str)
AS_TEXT = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, type(Ellipsis), PurePath)
BUILT_IN = (types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodDescriptorType)
# Of a module's own attributes these are described as such, or decide nothing.
TENSORS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


def network_identity(module: nn.Module, example: Tensor, leaf_modules: Sequence[str]) -> tuple[str, list[str]]:
    """Digest of what a network computes apart from the values of its parameters and buffers, and what of it cannot be
    told.

    example: ``[N, ...]``, to trace it with. leaf_modules: those that are not looked into, where the network can be
    traced in no other way. What cannot be told are objects without content, as a lock or an open file; where the graph
    could be traced they decide nothing, since every constant stands in the graph.
    """
    describe = _Describer(module)
    parts: list[Any] = [[name, describe.module(part)] for name, part in module.named_modules(remove_duplicate=False)]
    parts.append(["not trained", [name for name, x in module.named_parameters() if not x.requires_grad]])
    graph = _graph(module, example, leaf_modules)
    if graph is None:
        return digest(parts), describe.unknown
    inner = _Describer(graph)
    return digest([*parts, inner.graph(graph.graph)]), []


def _graph(module: nn.Module, example: Tensor, leaf_modules: Sequence[str]) -> fx.GraphModule | None:
    for leaves in [(), leaf_modules] if leaf_modules else [()]:
        try:
            return trace(module, (example,), leaves)[0]
        except Exception:  # noqa: S112  # whatever the user's network raises; quantizing it will say why
            continue
    return None


class _Describer:
    """Turns values into what JSON holds, equal where they compute alike.

    root: a network, whose modules are known by name. unknown: what could not be described.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root, self.unknown = root, list[str]()
        self._names = {id(part): name for name, part in root.named_modules()}
        self._seen: dict[int, tuple[int, Any]] = {}  # with the object itself, so that its id is not given away

    def value(self, value: Any) -> Any:
        """Any value, by its content."""
        if isinstance(value, enum.Enum):
            return ["enum", _path_of(type(value)), value.name]
        if type(value) in PLAIN:
            return value
        if isinstance(value, (float, complex, bytes, *AS_TEXT)):
            return [type(value).__name__, repr(value) if isinstance(value, (float, complex, bytes)) else str(value)]
        if isinstance(value, (Tensor, np.ndarray, np.generic)):
            return self._array(value)
        if type(value) in (set, frozenset):
            return ["set", sorted(digest(self.value(part)) for part in value)]
        if type(value) is tuple:
            return ["tuple", *map(self.value, value)]
        if isinstance(value, types.ModuleType):
            return ["import", value.__name__]
        if isinstance(value, BUILT_IN):
            return ["built in", getattr(value, "__module__", None), value.__qualname__]
        if id(value) in self._seen:
            return ["seen", self._seen[id(value)][0]]
        self._seen[id(value)] = len(self._seen), value
        return self._object(value)

    def module(self, module: nn.Module) -> Any:
        """A module's class and plain attributes, its hooks among them."""
        held = {name: value for name, value in vars(module).items() if name not in TENSORS}
        found: list[Any] = [self.value(type(module))]
        for name, value in sorted(held.items()):
            if "state_dict" in name:  # hooks of saving and loading
                continue
            if "hooks" in name and isinstance(value, Mapping):  # its keys count the hooks of the whole process
                value = list(value.values())
            found.append([name, self.value(value)])
        return found

    def graph(self, graph: fx.Graph) -> Any:
        """A traced graph: operations in order with their arguments, constants by value."""
        order = {node: index for index, node in enumerate(graph.nodes)}

        def argument(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return ["node", order[value]]
            if isinstance(value, (tuple, list)):
                return ["list", *map(argument, value)]
            if isinstance(value, slice):
                return ["slice", *map(argument, (value.start, value.stop, value.step))]
            if isinstance(value, Mapping):
                return ["dict", *([self.value(key), argument(part)] for key, part in value.items())]
            return self.value(value)

        found = []
        for node in graph.nodes:
            args = node.args[:3] if node.target is check_decision else node.args  # the last one is a line of a file
            target = self._held(str(node.target)) if node.op == "get_attr" else self.value(node.target)
            found.append([node.op, target, argument(args), argument(node.kwargs)])
        return found

    def _held(self, path: str) -> Any:
        value: Any = self.root
        for part in path.split("."):
            value = getattr(value, part, None)
        trained = isinstance(value, nn.Parameter)  # known by the network's weights
        return ["parameter", path] if trained else self.value(value)

    def _array(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            try:
                return ["tensor", tensors_digest({"": value})]
            except (RuntimeError, NotImplementedError, TypeError):  # without values (meta), or not dense
                return ["tensor", str(value.dtype), list(value.shape)]
        if value.dtype.hasobject:
            return ["array", list(value.shape), [self.value(part) for part in np.ravel(value).tolist()]]
        return ["array", str(value.dtype), list(value.shape), digest(np.ascontiguousarray(value).tobytes().hex())]

    def _object(self, value: Any) -> Any:
        if isinstance(value, list):
            return [_path_of(type(value)), *map(self.value, value)]
        if isinstance(value, dict):
            return [_path_of(type(value)), *([self.value(key), self.value(part)] for key, part in value.items())]
        if isinstance(value, nn.Module):  # of another than the network's own, which are known by name
            if id(value) in self._names:
                return ["module", self._names[id(value)]]
            tensors = {**dict(value.named_parameters(recurse=False)), **dict(value.named_buffers(recurse=False))}
            return [self.module(value), self.value(tensors), self.value(dict(value.named_children()))]
        if isinstance(value, fx.Graph):
            return self.graph(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        wrapped = getattr(value, "__wrapped__", None)  # of functools.lru_cache and the like
        return self.value(wrapped) if wrapped is not None else self._reduced(value)

    def _reduced(self, value: Any) -> Any:
        """Whatever else there is, by what it would be made anew from, as pickle and copy ask for it."""
        try:
            parts = value.__reduce_ex__(4)
        except Exception:
            self.unknown.append(_path_of(type(value)))
            return ["a", _path_of(type(value))]
        if isinstance(parts, str):
            return ["global", getattr(value, "__module__", None), parts]
        iterated = [list(part) if hasattr(part, "__next__") else part for part in parts]
        return ["made by", *map(self.value, iterated)]

    def _class(self, value: type) -> Any:
        """A class by its name; of the user's own also what it holds besides its source, with that of its bases."""
        if not is_local(value.__module__):
            return ["class", _path_of(value)]
        held: list[Any] = []
        for name, part in sorted(vars(value).items()):
            part = getattr(part, "__func__", getattr(part, "fget", part))
            if isinstance(part, (types.FunctionType, type)) or (not name.startswith("__") and _is_data(part)):
                held.append([name, self.value(part)])
        return ["class", _path_of(value), held, [self.value(base) for base in value.__bases__]]

    def _function(self, function: types.FunctionType) -> Any:
        """A function by its name; of the user's own also its code, what it encloses, and the globals that it reads."""
        name = ["function", function.__module__, function.__qualname__]
        if not is_local(str(function.__module__)):
            return name
        cells = [cell.cell_contents if _is_filled(cell) else None for cell in function.__closure__ or ()]
        known = {key: function.__globals__.get(key) for key in sorted(_names_in(function.__code__))}
        read = {k: v for k, v in known.items() if _is_data(v) or isinstance(v, (types.FunctionType, type))}
        code = self._code(function.__code__, function.__doc__)
        return [*name, code, *map(self.value, (function.__defaults__, function.__kwdefaults__, cells, read))]

    def _code(self, code: types.CodeType, docstring: str | None = None) -> Any:
        constants = code.co_consts[1:] if docstring is not None else code.co_consts  # the first one, if there is any
        inner = [self._code(part) if isinstance(part, types.CodeType) else self.value(part) for part in constants]
        return [code.co_code.hex(), list(code.co_names), inner]


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _names_in(code: types.CodeType) -> set[str]:
    inner = (_names_in(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return {*code.co_names, *itertools.chain.from_iterable(inner)}


def _is_data(value: Any) -> bool:
    """Whether a value is numbers, text, tensors, or a container, such as a configuration that was read from a file."""
    simple = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset)
    return isinstance(value, (*simple, Tensor, np.ndarray, np.generic, enum.Enum, types.SimpleNamespace))


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
