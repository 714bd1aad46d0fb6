"""The checkpoint of a network that is folded in parts: a folder a part, and the state of the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import treespec_dumps, treespec_loads

from bnre_exp.errors import UserError, few, first_line
from bnre_exp.files import replacing
from bnre_exp.quantsim.parts import PARTS, Part, parts_of, put_back

FORMAT, VERSION = "bnre_exp.folded_parts", 1
INDEX, REST = "parts.json", "rest.safetensors"
PLAIN = (bool, int, float, str, type(None))


def is_in_parts(path: Path) -> bool:
    """Whether a checkpoint is that of a network in parts."""
    return (path / INDEX).is_file()


def save_parts(whole: nn.Module, path: Path, save: Callable[[Any, Path], tuple[str, ...]]) -> tuple[str, ...]:
    """Write the folder ``path``, whole or not at all. save: writes the folder of a part, and returns what it lacks.

    Returns what the files cannot rebuild. Raises ``UserError`` where something else is there, or cannot be stored.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not is_in_parts(path))):
        raise UserError(f"{path} holds other files than a checkpoint, which saving would delete. Give another folder.")
    paths, lacking = getattr(whole, PARTS), list[str]()
    index: dict[str, Any] = {"format": FORMAT, "version": VERSION, "parts": {}}
    inside = tuple(f"{place}." for place in paths.values())
    rest = {name: value for name, value in whole.state_dict().items() if not name.startswith(inside)}
    try:
        with replacing(path) as new:
            new.mkdir()
            for name, graph in parts_of(whole).items():
                index["parts"][name] = _described(name, whole.get_submodule(paths[name].rpartition(".")[0]))
                lacking += [f"{name}.{what}" for what in save(graph, new / name)]
            save_file({name: value.contiguous().clone() for name, value in rest.items()}, new / REST)
            (new / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"The checkpoint {path} cannot be written: {error.strerror or error}.") from error
    return tuple(lacking)


def _described(name: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, Part) or not all(isinstance(value, PLAIN) for value in part.constants.values()):
        raise UserError(f"The network cannot be saved: {name} is called with something else than tensors and numbers.")
    return {"structure": treespec_dumps(part.structure), "constants": sorted(part.constants.items())}


def load_parts(path: Path, model: nn.Module | None, load: Callable[[Path, nn.Module], Any]) -> nn.Module:
    """The network that :func:`save_parts` wrote: a copy of ``model``, the network that was quantized, with its parts.
    load: reads the folder of a part, for which the float part is given.

    Raises ``UserError`` without ``model``, where it has no such parts, and for files that are damaged.
    """
    if model is None:
        raise UserError(
            f"The checkpoint {path} is that of parts of a network; load_folded(path, model=...) needs the network that "
            "was quantized."
        )
    try:
        index = json.loads((path / INDEX).read_text())
        if index.get("format") != FORMAT or index.get("version") != VERSION:
            raise UserError(f"{path / INDEX} has the format {index.get('format')!r}, version {index.get('version')!r}.")
        found = {
            name: (treespec_loads(part["structure"]), {int(place): value for place, value in part["constants"]})
            for name, part in index["parts"].items()
        }
        rest = load_file(path / REST)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"The checkpoint {path} cannot be loaded: {first_line(error)}.") from error
    known = {name for name, _ in model.named_modules()}
    if missing := [name for name in found if name not in known]:
        raise UserError(f"The checkpoint {path} cannot be loaded: the network has no part {few(missing)}.")
    whole = put_back(model, {n: (load(path / n, model.get_submodule(n)), *how) for n, how in found.items()})
    state = whole.state_dict()
    wrong = [name for name, value in rest.items() if name not in state or state[name].shape != value.shape]
    if wrong:
        raise UserError(f"The checkpoint {path} cannot be loaded: the network's {few(wrong)} is another.")
    whole.load_state_dict(rest, strict=False)
    return whole.eval()
