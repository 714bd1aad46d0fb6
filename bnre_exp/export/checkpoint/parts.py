"""The checkpoint of a network that is folded in parts: a folder a part, and the state of the rest."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten, treespec_dumps, treespec_loads

from bnre_exp.errors import UserError, few, first_line
from bnre_exp.export.checkpoint.files import check_replaceable
from bnre_exp.export.checkpoint.names import is_path
from bnre_exp.files import read_file, replacing
from bnre_exp.quantsim.part import Calling, Part
from bnre_exp.quantsim.parts import check_names, put_back
from bnre_exp.quantsim.whole import PARTS, parts_of
from bnre_exp.quantsim.wrappers import unwrapped

FORMAT, VERSION = "bnre_exp.folded_parts", 2  # 1 had no digest of the rest
INDEX, REST = "parts.json", "rest.safetensors"
PLAIN = (bool, int, float, str, type(None))
CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None)  # None: a leaf
DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError, StopIteration)


def is_in_parts(path: Path) -> bool:
    """Whether a checkpoint is that of a network in parts."""
    return (path / INDEX).is_file()


def save_parts(whole: nn.Module, path: Path, save: Callable[[Any, Path], tuple[str, ...]]) -> tuple[str, ...]:
    """Write the folder ``path``, whole or not at all. save: writes the folder of a part, and returns what it lacks.

    Returns what the files cannot rebuild. Raises ``UserError`` where something else is there, or cannot be stored.
    """
    path = Path(os.path.realpath(path))
    _check_replaceable(path)
    paths, lacking = getattr(whole, PARTS), list[str]()
    parts = {name: _described(name, whole.get_submodule(place.rpartition(".")[0])) for name, place in paths.items()}
    rest = _packed(_state_of_rest(whole))
    digest = hashlib.sha256(rest).hexdigest()
    index = {"format": FORMAT, "version": VERSION, "rest_sha256": digest, "parts": parts}
    try:
        with replacing(path) as new:
            new.mkdir()
            for name, graph in parts_of(whole).items():
                lacking += [f"{name}.{what}" for what in save(graph, new / name)]
            (new / REST).write_bytes(rest)
            (new / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"The checkpoint {path} cannot be written: {error.strerror or error}.") from error
    return tuple(lacking)


def _check_replaceable(path: Path) -> None:
    """Raise ``UserError`` unless ``path`` is free, an empty folder or such a checkpoint and nothing else."""
    if not path.is_dir() or not is_in_parts(path):
        check_replaceable(path)
        return
    try:
        parts = _index(path)["parts"]
        others = {entry.name for entry in path.iterdir()} - {INDEX, REST, *parts}
        for name in parts:
            check_replaceable(path / name)
    except DAMAGES as error:
        raise UserError(f"{path} cannot be replaced: {first_line(error)}. Give another folder.") from error
    if others:
        raise UserError(
            f"{path} holds other files than a checkpoint ({few(sorted(others))}), which saving would delete. Give "
            "another folder, or remove them."
        )


def _state_of_rest(whole: nn.Module) -> dict[str, Tensor]:
    inside = tuple(f"{place}." for place in getattr(whole, PARTS).values())
    return {name: value for name, value in whole.state_dict().items() if not name.startswith(inside)}


def _packed(rest: dict[str, Tensor]) -> bytes:
    try:
        return safetensors.torch.save({name: value.detach().cpu().contiguous().clone() for name, value in rest.items()})
    except Exception as error:  # a state that is no tensor, or one that safetensors does not hold
        raise UserError(
            f"The network cannot be saved: the state outside of its parts is no dense tensors ({first_line(error)})."
        ) from error


def _described(name: str, part: Any) -> dict[str, Any]:
    if not is_path(name) or "/" in name:
        raise UserError(f"The network cannot be saved: rename its module {name!r}, which is to name a folder.")
    if not isinstance(part, Part) or not all(isinstance(value, PLAIN) for value in part.calling.constants.values()):
        raise UserError(f"The network cannot be saved: {name} is called with something else than tensors and numbers.")
    try:
        structure = treespec_dumps(part.calling.structure)
        _structure(structure)
    except (*DAMAGES, NotImplementedError) as error:
        raise UserError(
            f"The network cannot be saved: {name} is called with other containers than tuples, lists and dicts."
        ) from error
    gives = part.calling.gives and part.calling.gives.__name__
    _class_named(gives, part.original)
    return {"structure": structure, "constants": sorted(part.calling.constants.items()), "gives": gives}


def load_parts(path: Path, model: nn.Module | None, load: Callable[[Path, nn.Module], Any]) -> nn.Module:
    """The network that :func:`save_parts` wrote: a copy of ``model``, the network that was quantized, with its parts.
    load: reads the folder of a part, for which the float part is given.

    Raises ``UserError`` without ``model``, where it has no such parts or tensors, and for files that are damaged.
    """
    if model is None:
        raise UserError(
            f"The checkpoint {path} is that of parts of a network; load_folded(path, model=...) needs the network that "
            "was quantized."
        )
    model = unwrapped(model)
    try:
        index = _index(path)
        check_names(model, list(index["parts"]))
        found = {name: _calling(part, model.get_submodule(name)) for name, part in index["parts"].items()}
        content = read_file(path / REST)
        if hashlib.sha256(content).hexdigest() != index["rest_sha256"]:
            raise UserError(f"{REST} is not the file that {INDEX} was written with (its SHA-256 differs)")
        rest = safetensors.torch.load(content)
    except (*DAMAGES, NotImplementedError) as error:
        raise UserError(f"The checkpoint {path} cannot be loaded: {first_line(error).rstrip('.')}.") from error
    whole = put_back(model, {n: (load(path / n, model.get_submodule(n)), how) for n, how in found.items()})
    state = _state_of_rest(whole)
    fits = {name for name in rest.keys() & state.keys() if _kind(state[name]) == _kind(rest[name])}
    if wrong := sorted((rest.keys() | state.keys()) - fits):
        raise UserError(f"The checkpoint {path} cannot be loaded: the network's {few(wrong)} is another.")
    whole.load_state_dict(rest, strict=False)
    return whole.eval()


def _kind(tensor: Any) -> Any:
    return (tensor.shape, tensor.dtype) if isinstance(tensor, Tensor) else None


def _index(path: Path) -> dict[str, Any]:
    """The content of the JSON file. Raises one of DAMAGES where it is not ours."""
    index = json.loads(read_file(path / INDEX))
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{INDEX} was not written by save_folded: its format is not {FORMAT!r}")
    if index.get("version") != VERSION:
        raise UserError(f"{INDEX} has version {index.get('version')!r}; this bnre_exp reads {VERSION}. Save it again")
    if not isinstance(index.get("parts"), dict) or not index["parts"]:
        raise UserError(f"{INDEX} names no parts")
    return index


def _calling(part: Any, original: nn.Module) -> Calling:
    structure = _structure(part["structure"])
    constants = dict(part["constants"])
    count = structure.num_leaves
    if not all(type(place) is int and 0 <= place < count for place in constants) or len(constants) >= count:
        raise UserError(f"{INDEX} has constants in places that there are not")
    if not all(isinstance(value, PLAIN) for value in constants.values()):
        raise UserError(f"{INDEX} has constants that are neither numbers nor texts")
    return Calling(structure, constants, _class_named(part["gives"], original))


def _class_named(name: Any, part: nn.Module) -> type | None:
    """The class of dicts of this name that the code of a part knows."""
    if name is None:
        return None
    for module in part.modules():
        found = getattr(sys.modules.get(type(module).__module__), str(name), None)
        if isinstance(found, type) and issubclass(found, dict):
            return found
    if name == OrderedDict.__name__:
        return OrderedDict
    raise UserError(f"it gives a {name}, which the code of the part does not know")


def _is_keys(context: Any) -> bool:
    return context is None or (isinstance(context, list) and all(type(key) in (str, int) for key in context))


def _structure(text: str) -> TreeSpec:
    """A structure of arguments. torch would import modules for one with other containers or keys in it."""
    _, content = json.loads(text)
    levels = [content]
    while levels:
        level = levels.pop()
        if level["type"] not in CONTAINERS or not _is_keys(json.loads(level["context"] or "null")):
            raise UserError(f"a {level['type']}; expected tuples, lists and dicts of tensors")
        levels += level["children_spec"]
    structure = treespec_loads(text)
    tree_unflatten(range(structure.num_leaves), structure)
    if structure.type is not tuple or [child.type for child in structure.children()] != [tuple, dict]:
        raise UserError("something that is no list of arguments")
    return structure
