"""The network between two stages: in memory, or in a file from which it is taken up only if a stage needs it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from bnre_exp.algorithms.snapshot import hidden_buffers, restore_hidden_buffers
from bnre_exp.errors import UserError, first_line
from bnre_exp.jobs.stages.setting import Setting

STATE, HIDDEN = "state.safetensors", "buffers.safetensors"


def check_storable(network: nn.Module) -> None:
    """Raise ``UserError`` if a network's state cannot be written to a file."""
    for name, value in network.state_dict().items():
        kind = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        if isinstance(value, Tensor) and value.layout is torch.strided:
            with suppress(KeyError, SafetensorError):
                save({"one": torch.zeros(1, dtype=value.dtype)})
                continue
        raise UserError(
            f"model: the network keeps {name!r}, a {kind}, in its state dict; expected dense tensors of a type that "
            "safetensors holds. Leave it out (no get_extra_state, register_buffer with persistent=False)."
        )


class Result:
    """What a stage left: its network, and where that is kept.

    folder: where the state is, None if it is kept nowhere; content: its SHA-256, or that of what the network follows
    from.
    """

    def __init__(
        self,
        network: nn.Module | None,
        folder: Path | None = None,
        content: str | None = None,
        restore: Callable[[], nn.Module] | None = None,
    ) -> None:
        self._network, self._restore = network, restore
        self.folder, self.content = folder, content

    def take(self) -> nn.Module:
        """The network itself, taken up from its file if need be."""
        if self._network is None:
            if self._restore is None:
                raise RuntimeError("no network and no file of one")
            self._network, self._restore = self._restore(), None
        return self._network


@dataclass(frozen=True)
class Form:
    """How the network of a stage is kept in a folder, and taken up from there or from the result before it."""

    keep: Callable[[Path, nn.Module], None]
    restore: Callable[[Setting, Path, Result], nn.Module]


def save_state(folder: Path, network: nn.Module, notes: dict[str, str] | None = None) -> None:
    """Write the network's parameters and buffers into a folder, and notes for :func:`notes_of`."""
    save_weights(folder / STATE, network, notes)
    hidden = {name: buffer.detach().cpu().contiguous().clone() for name, buffer in hidden_buffers(network).items()}
    if hidden:
        save_file(hidden, folder / HIDDEN)


def save_weights(path: Path, network: nn.Module, notes: dict[str, str] | None = None) -> None:
    """Write a state dict as a safetensors file: what several names share once, with the others in its metadata, as
    safetensors' ``load_model`` reads it; a tensor that is a part of a larger one as a tensor of its own."""
    first, kept, shared = dict[Any, str](), dict[str, Tensor](), dict[str, str]()
    for name, tensor in sorted(network.state_dict().items()):
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            shared[name] = first[place]
            continue
        first[place] = name
        is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        kept[name] = tensor if is_whole else tensor.contiguous().clone()
    save_file(kept, path, {**(notes or {}), **shared})


def notes_of(folder: Path) -> dict[str, str]:
    """What was noted with a stored network."""
    with safe_open(folder / STATE, framework="pt") as file:
        return file.metadata() or {}


def load_state(folder: Path, network: nn.Module) -> nn.Module:
    """Fill a network with what :func:`save_state` wrote; in place. Raises ``UserError`` if that does not fit."""
    state, shared = load_file(folder / STATE), notes_of(folder)
    state.update({name: state[first] for name, first in shared.items() if first in state})
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{folder}: the stored network does not fit; run again with store.mode=refresh ({first_line(error)})."
        ) from error
    saved = load_file(folder / HIDDEN) if (folder / HIDDEN).exists() else {}
    restore_hidden_buffers(network, saved)
    return network


def _restore_float(setting: Setting, folder: Path, before: Result) -> nn.Module:
    return load_state(folder, setting.built.module)


FLOAT = Form(save_state, _restore_float)
SAME = Form(lambda folder, network: None, lambda setting, folder, before: before.take())  # as that of the stage before
