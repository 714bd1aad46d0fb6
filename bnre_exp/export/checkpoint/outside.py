"""What a checkpoint cannot hold, taken from the model that the user gives when loading it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError
from bnre_exp.export.checkpoint.graph_json import qualified_name
from bnre_exp.export.checkpoint.module_json import restore_codes
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
    """A look-up among the functions that source files of the model's classes mark with ``torch.fx.wrap``."""
    marked: dict[str, Callable[..., Any]] = {}
    if model is not None:
        sources = {type(module).__module__ for module in model.modules()}
        # torch.fx has no public list of what wrap() marked; this maps (id of a file's globals, name) to these globals.
        for (_, name), source in fx._symbolic_trace._wrapped_fns_to_patch.items():
            if source.get("__name__") in sources and callable(function := source.get(name)):
                marked[qualified_name(function)] = function

    def find(name: str) -> Callable[..., Any]:
        if name not in marked:
            raise UserError(
                f"the function {name} is not marked with torch.fx.wrap in a source file of model='s classes; move the "
                "call into a submodule, keep that whole with leaf_modules, and save again"
            )
        return marked[name]

    return find
