"""From the content of a checkpoint to a network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from bnre_exp.errors import UserError
from bnre_exp.export.checkpoint.graph_json import Names, decode_graph, outside_functions
from bnre_exp.export.checkpoint.module_json import build_module
from bnre_exp.export.checkpoint.names import is_name, is_path
from bnre_exp.export.checkpoint.outside import class_finder, function_finder, module_from_model
from bnre_exp.export.checkpoint.tensors import decode_tensors
from bnre_exp.export.checkpoint.value_json import decode_value


def outside_names(modules: Mapping[str, Mapping[str, Any]], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """``"name (type)"`` of what is not on the allow-list."""
    named = [f"{name} ({module['outside']})" for name, module in modules.items() if "outside" in module]
    return (*named, *(f"{name} (function)" for name in outside_functions(rows)))


def some_of(names: Sequence[str], shown: int = 3) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"


def rebuild(
    document: Mapping[str, Any],
    weights: bytes,
    model: nn.Module | None,
    find: Callable[[str], Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """The network, in evaluation mode. find: what has a name outside the allow-list; None: searched in ``model``.

    Raises ``UserError`` for what is not allowed or does not fit, and any other exception for a document that is not
    built as ours are.
    """
    modules, attributes, rows = document["modules"], document["attributes"], document["graph"]
    outside = outside_names(modules, rows)
    if outside and model is None:
        raise UserError(f"it holds {some_of(outside)}; give load_folded(path, model=the network that was quantized)")
    tensors = decode_tensors(weights, document["tensors"])
    bad = [name for name in (*modules, *attributes) if not is_path(name)]
    if bad or not is_name(document["name"]):
        raise UserError(f"it has names that are none: {[*bad, document['name']]!r}")
    states = _by_module(tensors, modules)
    root = nn.Module()
    readable = set(attributes)
    for name, description in modules.items():
        state = states.get(name, {})
        readable |= {f"{name}.{key}" for key in (*state, *description.get("codes", ()))}
        owner, own_name = _owner(root, name)
        owner.add_module(own_name, _leaf(name, description, state, model))
    for name, kind in attributes.items():
        owner, own_name = _owner(root, name)
        if kind == "parameter":
            owner.register_parameter(own_name, nn.Parameter(tensors[name], requires_grad=False))
        else:
            owner.register_buffer(own_name, tensors[name], persistent=kind == "buffer")
    if not readable >= tensors.keys():
        raise UserError(f"tensors that belong to no module: {', '.join(sorted(tensors.keys() - readable))}")
    graph = decode_graph(rows, Names(modules, readable, find or function_finder(model), class_finder(model)))
    loaded = fx.GraphModule(root, graph, document["name"])
    loaded.graph.lint()
    frozen = set(document["frozen"])
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if "fold_report" in document:
        loaded.meta["fold_report"] = decode_value(document["fold_report"], {})
    if "classes" in document:
        loaded.meta["classes"] = tuple(str(name) for name in document["classes"])
    return loaded.eval()


def _by_module(tensors: Mapping[str, Tensor], modules: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """The state of each module."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for end in (i for i, letter in enumerate(name) if letter == "."):
            if name[:end] in modules:
                states.setdefault(name[:end], {})[name[end + 1 :]] = tensor
    return states


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds what is at ``path``, made where it is not there yet, and the last part of the path."""
    parts = path.split(".")
    owner = root
    for part in parts[:-1]:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    return owner, parts[-1]


def _leaf(name: str, description: Mapping[str, Any], state: Mapping[str, Tensor], model: nn.Module | None) -> nn.Module:
    try:
        if "outside" in description and model is not None:
            return module_from_model(name, description, state, model)
        return build_module(description, state)
    except UserError as error:
        raise UserError(f"module {name}: {error}") from error
    except Exception as error:  # whatever a constructor or load_state_dict raises
        raise UserError(f"the module {name} cannot be built from its class, arguments and tensors: {error}") from error
