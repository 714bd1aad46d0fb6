"""What a checkpoint cannot hold, taken from the model that the user gives when loading it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError
from bnre_exp.export.checkpoint.module_json import restore_codes
from bnre_exp.export.checkpoint.names import equivalent_class, fields_of, qualified_name
from bnre_exp.quantsim.quantizers.layout import LAYERS, out_channels
from bnre_exp.quantsim.quantizers.state import scheme_keys


def module_from_model(
    name: str, description: Mapping[str, Any], state: Mapping[str, Tensor], model: nn.Module
) -> nn.Module:
    """A copy of the model's module ``name`` with the tensors of ``state`` in it; on the CPU, in evaluation mode.

    description: "outside", the name of its class, and "codes", which of its tensors are integer codes. Raises
    ``UserError`` if the model has no such module, of that class, with such tensors.
    """
    found, kind = _find(name, model), description["outside"]
    if found is None:
        raise UserError(f"model= ({type(model).__name__}) has no module {name!r}; give the network that was quantized")
    actual = qualified_name(parametrize.type_before_parametrizations(found))
    if actual.rpartition(".")[2] != kind.rpartition(".")[2]:
        raise UserError(f"the module {name!r} of model= is a {actual}, expected a {kind}")
    module: Any = copy.deepcopy(found).cpu().eval()
    if isinstance(module, LAYERS) and module.bias is None and {"bias", "parametrizations.bias.original"} & state.keys():
        module.bias = nn.Parameter(torch.zeros(out_channels(module)))  # folding gave it one
    for tensor, spec in description["codes"].items():
        if not parametrize.is_parametrized(module, tensor):
            restore_codes(module, tensor, spec, state)
    _check_shapes(name, module, state)
    persistent = module.state_dict().keys()
    module.load_state_dict({key: x for key, x in state.items() if key in persistent}, strict=True, assign=True)
    for key in state.keys() - persistent:
        owner, _, buffer = key.rpartition(".")
        setattr(module.get_submodule(owner), buffer, state[key])
    return module


def _find(name: str, model: nn.Module) -> nn.Module | None:
    """By its path, or by its path with underscores for dots, as the parts of a BN with an activation are named."""
    modules = dict(model.named_modules())
    alike = [module for path, module in modules.items() if path.replace(".", "_") == name]
    return modules.get(name, alike[0] if len(alike) == 1 else None)


def _check_shapes(name: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = {**module.state_dict(), **dict(module.named_buffers(remove_duplicate=False))}
    own = {key: value for key, value in own.items() if key not in scheme_keys(module)}
    if own.keys() != state.keys():
        keys = ", ".join(sorted(own.keys() ^ state.keys()))
        raise UserError(f"the module {name!r} of model= has other tensors than the checkpoint: {keys}")
    for key, value in state.items():
        if own[key].shape != value.shape:
            raise UserError(
                f"{name}.{key} has the shape {tuple(own[key].shape)} in model=, {tuple(value.shape)} in the checkpoint"
            )


def function_finder(model: nn.Module | None) -> Callable[[str], Callable[..., Any]]:
    """A look-up among the functions marked with ``torch.fx.wrap``, and the dataclasses, of the source files of the
    model's classes and of those that these import from."""
    sources = _sources(model)

    def find(name: str) -> Callable[..., Any]:
        marked = [function for function in marked_functions(sources) if qualified_name(function) == name]
        classes = [found for found in (_at(name, source) for source in sources) if _is_record(found)]
        if marked or classes:
            return [*marked, *classes][0]  # type: ignore[no-any-return]
        raise UserError(
            f"the function {name} is not marked with torch.fx.wrap in a source file of model='s classes; move the "
            "call into a submodule, keep that whole with leaf_modules, and save again"
        )

    return find


def class_finder(model: nn.Module | None) -> Callable[[str, tuple[str, ...]], type]:
    """A look-up of a class of named tuples by its name and fields: the user's own where the source files of the model
    have it, else one that stands for it."""
    sources = _sources(model)

    @cache
    def find(name: str, fields: tuple[str, ...]) -> type:
        for found in (_at(name, source) for source in sources):
            if fields_of(found) == fields:
                return found  # type: ignore[no-any-return]
        return equivalent_class(name, fields)

    return find


def check_findable(thing: Any) -> None:
    """Raise ``UserError`` if :func:`function_finder` cannot find it, whatever model it is given."""
    source = getattr(thing, "__module__", None)
    is_marked = any(function is thing for function in marked_functions(None))
    if not is_marked and not (_is_record(thing) and _at(qualified_name(thing), str(source)) is thing):
        raise UserError(
            f"it calls {qualified_name(thing)}, which load_folded could not find: a function has to be marked with "
            "torch.fx.wrap where it is called, a dataclass defined at the top of its file; or move the call into a "
            "submodule and keep that whole with leaf_modules=[its class]"
        )


def _sources(model: nn.Module | None) -> dict[str, None]:
    """Names of the modules that define the model's classes, and of those that what they name comes from."""
    own = dict.fromkeys(type(module).__module__ for module in (model.modules() if model is not None else ()))
    named = [value for name in own if name in sys.modules for value in vars(sys.modules[name]).values()]
    there = [value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) for value in named]
    return own | dict.fromkeys(name for name in there if isinstance(name, str))


def marked_functions(sources: Collection[str] | None) -> Iterator[Callable[..., Any]]:
    """What ``torch.fx.wrap`` marked in these source files; None: in any."""
    # torch.fx has no public list of what wrap() marked; this maps (id of a file's globals, name) to these globals.
    for (_, name), source in fx._symbolic_trace._wrapped_fns_to_patch.items():
        if (sources is None or source.get("__name__") in sources) and callable(function := source.get(name)):
            yield function


def _is_record(thing: Any) -> bool:
    return isinstance(thing, type) and is_dataclass(thing)


def _at(name: str, source: str) -> Any:
    """What a loaded source file has under a qualified name, None if nothing."""
    found: Any = sys.modules.get(source) if name.startswith(f"{source}.") else None
    for part in name.removeprefix(f"{source}.").split("."):
        found = vars(found).get(part) if isinstance(found, (type, ModuleType)) else None
    return found
