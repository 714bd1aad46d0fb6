"""Weights from a checkpoint file into a network: unwrapped, prefixes stripped, every difference named."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError

logger = logging.getLogger(__name__)

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_SHOWN = 5


def read_state_dict(path: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.pth``/``.pt``/``.bin`` file by name, on the CPU; no pickled code is run.

    A dict that holds them under ``state_dict``, ``model_state_dict`` or ``model`` is unwrapped. Raises UserError where
    the file is missing, damaged, needs pickle, or holds something else.
    """
    setting = f"model.checkpoint={path}"
    location = os.path.expanduser(path)
    if not os.path.isfile(location):
        raise UserError(f"{setting}: there is no such file (looked in {os.path.dirname(os.path.abspath(location))}).")
    if not location.endswith(_SUFFIXES):
        raise UserError(f"{setting}: expected a file that ends in {', '.join(_SUFFIXES)}.")
    content = _read_file(location, setting)
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        raise UserError(
            f"{setting} holds a {type(content).__name__}, not a state dict of named tensors. {_how_to_save()}"
        )
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"{setting} is not a state dict: {_listed(others)} hold no tensors (unwrapped are only dicts under "
            f"{', '.join(_WRAPPERS)}). {_how_to_save()}"
        )
    return dict(content)


def _how_to_save() -> str:
    return "Save one with torch.save(model.state_dict(), 'FILE.pth') or safetensors.torch.save_file."


def _read_file(location: str, setting: str) -> Any:
    if location.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(location)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{setting} is no intact safetensors file: {error}. Get or save it again.") from error
    try:
        return torch.load(location, weights_only=True, map_location="cpu")
    except Exception as error:
        # A damaged file makes the unpickler raise whatever its bytes lead to (KeyError, EOFError, RuntimeError, ...).
        needs_pickle = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper()
        if needs_pickle or "TorchScript" in str(error):
            raise UserError(
                f"{setting} holds Python objects besides tensors, which would run code when loaded; expected a state "
                f"dict. {_how_to_save()}"
            ) from error
        raise UserError(
            f"{setting} is damaged or no file of torch.save ({type(error).__name__}). Get or save it again."
        ) from error


def load_checkpoint(
    module: nn.Module,
    path: str,
    *,
    strip_prefixes: Sequence[str] = (),
    strict: bool = True,
    heads: Sequence[str] = (),
    replace_head: bool = False,
) -> tuple[str, ...]:
    """Load the tensors of the file ``path`` into ``module``, in place; returns notes for the report.

    ``strip_prefixes`` are removed where every key has them. ``heads`` are the names of the layers whose output count is
    the class count: a checkpoint of another count raises UserError unless ``replace_head``, which leaves the module's
    own head as it is. Raises UserError on other shapes (always), and on missing or unexpected keys unless ``strict`` is
    off; the module is then unchanged.
    """
    state, own = read_state_dict(path), module.state_dict()
    state, notes = _strip(state, strip_prefixes, own)
    setting = f"model.checkpoint={path}"
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshapen = [key for key in state if key in own and state[key].shape != own[key].shape]
    in_head = [key for key in misshapen if key.rpartition(".")[0] in heads]
    complete = not (strict and (missing or unexpected)) and len(unexpected) < len(state)
    if misshapen and misshapen == in_head and complete:
        _check_head_shapes(state, own, in_head, setting, replace_head)
        state = {key: value for key, value in state.items() if key not in in_head}
        notes.append(f"checkpoint: the head was not loaded, it has another class count ({', '.join(in_head)})")
    elif misshapen or not complete:
        raise UserError(_differences(setting, state, own, missing, unexpected, misshapen))
    for what, keys in (("missing in", missing), ("unexpected in", unexpected)):
        if keys:
            notes.append(f"{len(keys)} keys {what} the checkpoint: {', '.join(keys)}")
    module.load_state_dict(state, strict=False)
    for note in notes:
        logger.info("%s", note)
    return tuple(notes)


def _strip(
    state: dict[str, Tensor], prefixes: Sequence[str], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    notes: list[str] = []
    while True:
        for prefix in prefixes:
            # A network whose own names all start like that, such as a wrapper's `model.`, wants the prefix.
            wanted = bool(own) and all(key.startswith(prefix) for key in own)
            if prefix and not wanted and all(key.startswith(prefix) for key in state):
                state = {key[len(prefix) :]: value for key, value in state.items()}
                notes.append(f"checkpoint: the prefix {prefix} was stripped")
                break
        else:
            return state, notes


def _check_head_shapes(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], keys: Sequence[str], setting: str, replace_head: bool
) -> None:
    if all(state[key].shape[1:] == own[key].shape[1:] for key in keys) and replace_head:
        return
    theirs, ours = state[keys[0]].shape, own[keys[0]].shape
    if theirs[1:] != ours[1:]:
        raise UserError(
            f"{setting}: {keys[0]} is {list(theirs)} in the file and {list(ours)} in the network; it is a checkpoint "
            "of another architecture. Check model.name and model.kwargs."
        )
    raise UserError(
        f"{setting} has a head of {theirs[0]} classes ({keys[0]}), the network one of {ours[0]}. Set "
        "model.replace_head=true to start that layer anew, or give the dataset of the checkpoint's classes."
    )


def _differences(
    setting: str,
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshapen: Sequence[str],
) -> str:
    lines = [f"{setting} does not fit the network ({len(state)} tensors in the file, {len(own)} in the network):"]
    if misshapen:
        shapes = [f"{key} {list(state[key].shape)} in the file, {list(own[key].shape)} expected" for key in misshapen]
        lines.append(f"{len(misshapen)} of another shape: {_listed(shapes, '; ')}.")
    if missing:
        lines.append(f"{len(missing)} missing in the file: {_listed(missing)}.")
    if unexpected:
        lines.append(f"{len(unexpected)} unexpected in the file: {_listed(unexpected)}.")
    way_out = "Check model.name, model.kwargs and model.strip_prefixes"
    if not misshapen and len(unexpected) < len(state):
        way_out += ", or set model.strict=false to load what fits"
    return " ".join([*lines, way_out + "."])


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more
