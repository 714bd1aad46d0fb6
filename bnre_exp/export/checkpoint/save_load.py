"""Folded networks as files: a safetensors file and a JSON file that need neither pickle nor the model's own code."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError
from bnre_exp.export.checkpoint.files import check_replaceable, read_checkpoint, write_checkpoint
from bnre_exp.export.checkpoint.graph_json import encode_graph, outside_functions
from bnre_exp.export.checkpoint.module_json import describe_codes, describe_module
from bnre_exp.export.checkpoint.names import is_name, is_path, qualified_name
from bnre_exp.export.checkpoint.outside import check_findable
from bnre_exp.export.checkpoint.parts import is_in_parts, load_parts, save_parts
from bnre_exp.export.checkpoint.rebuild import outside_names, rebuild, some_of
from bnre_exp.export.checkpoint.tensors import encode_tensors
from bnre_exp.export.checkpoint.value_json import encode_value
from bnre_exp.export.folded import check_folded
from bnre_exp.quantsim.quantizers.state import scheme_keys
from bnre_exp.quantsim.whole import parts_of

logger = logging.getLogger(__name__)


def save_folded(folded: nn.Module, path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Write a folded network to the folder ``path``, whole or not at all; the network is unchanged.

    The folder holds ``weights.safetensors`` (every tensor as it is, weights as integer codes and scales) and
    ``network.json`` (the graph, the class and constructor arguments of its modules, and the names of the classes where
    ``folded.meta["classes"]`` has them). A checkpoint that is there is replaced. A network that was simulated in parts
    gives a folder with such a folder a part; it needs ``model=``.

    Returns, and logs, what these files cannot rebuild, as ``"name (type)"``: modules and functions that are neither
    torch's, torchvision's nor ours. :func:`load_folded` then needs ``model=``. Named tuples need nothing: without the
    user's own class, one with the same name and fields stands for it.

    Raises ``UserError`` if the network is not folded, holds something that cannot be stored or loaded again, or the
    folder holds other files or cannot be written.
    """
    target = Path(path)
    if parts_of(folded):
        return save_parts(folded, target, save_folded)
    check_replaceable(target)
    try:
        document, tensors = _describe(folded)
        weights, document["tensors"] = encode_tensors(tensors, _bits(document["modules"]))
        _check_loads(folded, document, weights)
    except UserError as error:
        raise UserError(f"The network cannot be saved: {error}.") from error
    write_checkpoint(target, document, weights)
    outside = outside_names(document["modules"], document["graph"])
    if outside:
        logger.warning("The checkpoint %s needs load_folded(path, model=...) because of %s", path, some_of(outside))
    return outside


def load_folded(path: str | os.PathLike[str], model: nn.Module | None = None) -> Any:
    """Return the network that :func:`save_folded` wrote, with its tensors and outputs bit for bit.

    It is in evaluation mode and on the CPU. Only tensor functions and modules of torch, torchvision and our own are
    ever called, apart from what ``model`` provides.

    model: the network that was quantized; needed only where the checkpoint holds modules or functions of the user's
    own. Modules are copied from it and filled with the checkpoint's tensors; functions are those that its source files
    mark with ``torch.fx.wrap``.

    Raises ``UserError`` if the files are missing, damaged or not ours, or ``model`` is needed or does not fit.
    """
    if is_in_parts(Path(path)):
        return load_parts(Path(path), model, load_folded)
    document, weights = read_checkpoint(Path(path))
    try:
        return rebuild(document, weights, model)
    except UserError as error:
        raise UserError(f"The checkpoint {path} cannot be loaded: {error}.") from error
    except Exception as error:  # a file from outside can be wrong in any way, and each is the same to the user
        raise UserError(
            f"The checkpoint {path} cannot be loaded: its network.json is damaged ({type(error).__name__}: {error})."
        ) from error


def _describe(folded: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    check_folded(folded)
    rows = encode_graph(folded.graph)
    leaves = {str(row["target"]): folded.get_submodule(row["target"]) for row in rows if row["op"] == "call_module"}
    modules = {name: _describe_leaf(name, leaf, leaves) for name, leaf in leaves.items()}
    attributes = _attributes(folded, rows, leaves)
    parameters = dict(folded.named_parameters(remove_duplicate=False))
    document = {
        "name": type(folded).__name__ if is_name(type(folded).__name__) else "GraphModule",
        "graph": rows,
        "modules": modules,
        "attributes": {key: _kind(folded, key) for key in attributes},
        "frozen": [name for name, parameter in parameters.items() if not parameter.requires_grad],
        **_meta(folded),
    }
    tensors = {f"{name}.{key}": value for name, leaf in leaves.items() for key, value in _state(name, leaf).items()}
    return document, {**tensors, **attributes}


def _check_loads(folded: Any, document: dict[str, Any], weights: bytes) -> None:
    """Raise ``UserError`` unless :func:`load_folded` would make the same network of what is about to be written."""
    called = {qualified_name(node.target): node.target for node in folded.graph.nodes if node.op == "call_function"}
    for name in outside_functions(document["graph"]):
        check_findable(called[name])
    read = json.loads(json.dumps(document))
    again, _ = _describe(rebuild(read, weights, folded, called.__getitem__))
    again = json.loads(json.dumps(again))
    different = [key for key in again if key != "tensors" and again[key] != read[key]]
    if different:
        raise UserError(f"what would be loaded differs from it in {', '.join(different)}")


def _bits(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many bits the codes of each weight have, by tensor; biases are the int32 that the target adds."""
    specs = {
        f"{name}.parametrizations.weight.original": module["codes"].get("weight") for name, module in modules.items()
    }
    return {name: int(spec["bits"]) for name, spec in specs.items() if spec is not None}


def _describe_leaf(name: str, leaf: nn.Module, leaves: Mapping[str, nn.Module]) -> dict[str, Any]:
    around = [other for other in leaves if name.startswith(f"{other}.")]
    if around:
        raise UserError(f"{name} is called by itself and is part of {around[0]}, which is kept whole; keep only one so")
    if not is_path(name):
        raise UserError(f"the module name {name!r} has characters that a checkpoint does not allow; rename it")
    kind = qualified_name(parametrize.type_before_parametrizations(leaf))
    return describe_module(leaf) or {"outside": kind, "codes": describe_codes(leaf) or {}}


def _state(name: str, leaf: nn.Module) -> dict[str, Tensor]:
    """All tensors of a leaf, non-persistent buffers included; schemes are among the arguments of its modules."""
    state = {**leaf.state_dict(), **{key: x for key, x in leaf.named_buffers(remove_duplicate=False)}}
    state = {key: value for key, value in state.items() if key not in scheme_keys(leaf)}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"the state of {name} ({type(leaf).__name__}) holds {key!r}, which is not a tensor")
    return state


def _attributes(
    folded: fx.GraphModule, rows: list[dict[str, Any]], leaves: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Tensors that the graph reads by path and that belong to no leaf."""
    paths = dict.fromkeys(str(row["target"]) for row in rows if row["op"] == "get_attr")
    paths = {path: None for path in paths if not any(path.startswith(f"{leaf}.") for leaf in leaves)}
    found = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        value = getattr(folded.get_submodule(parent), name)
        if not isinstance(value, Tensor):
            raise UserError(f"it reads {path}, which is not a tensor but a {type(value).__name__}")
        found[path] = value
    return found


def _kind(folded: fx.GraphModule, path: str) -> str:
    parent, _, name = path.rpartition(".")
    owner = folded.get_submodule(parent)
    if name in owner._parameters:
        return "parameter"
    return "non-persistent buffer" if name in owner._non_persistent_buffers_set else "buffer"


def _meta(folded: fx.GraphModule) -> dict[str, Any]:
    """What is known of the network besides what it computes."""
    report, classes, known = folded.meta.get("fold_report"), folded.meta.get("classes"), dict[str, Any]()
    with suppress(UserError):
        known.update({"fold_report": encode_value(report)} if isinstance(report, dict) else {})
    if classes is not None:
        known["classes"] = [str(name) for name in classes]
    return known
