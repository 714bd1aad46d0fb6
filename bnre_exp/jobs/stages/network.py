"""The network between two stages: in memory, or in a file from which it is taken up only if a stage needs it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save, save_file, save_model
from torch import Tensor, fx, nn

from bnre_exp.algorithms.snapshot import hidden_buffers, restore_hidden_buffers
from bnre_exp.errors import UserError
from bnre_exp.jobs.stages.setting import Setting, scheme
from bnre_exp.quantsim.insert import rebuild_sim

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


def save_state(folder: Path, network: nn.Module) -> None:
    """Write the network's parameters and buffers into a folder."""
    save_model(network, str(folder / STATE))
    hidden = {name: buffer.detach().cpu().contiguous().clone() for name, buffer in hidden_buffers(network).items()}
    if hidden:
        save_file(hidden, folder / HIDDEN)


class Passing:
    """A network on its way from stage to stage: what a stage left, or the folder that holds its state.

    folder: where the state is, content: its SHA-256; None if it was not stored.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._network: nn.Module | None = setting.built.module
        self._is_sim = False
        self.folder: Path | None = None
        self.content: str | None = None

    def computed(self, network: nn.Module, folder: Path | None, content: str | None) -> None:
        """A stage made this network, and its state was stored in ``folder``, if it was."""
        self._network, self._is_sim = network, isinstance(network, fx.GraphModule)
        self.folder, self.content = folder, content

    def found(self, folder: Path, content: str | None, is_sim: bool) -> None:
        """A stage's result was found in ``folder``: a simulation, or the FP32 network."""
        self._network, self._is_sim = None, is_sim
        self.folder, self.content = folder, content

    def take(self) -> nn.Module:
        """The network itself, taken up from its file if need be."""
        if self._network is None:
            if self.folder is None:
                raise RuntimeError("no network and no file of one")
            self._network = self._rebuilt() if self._is_sim else self._setting.built.module
            missing, unexpected = load_model(self._network, str(self.folder / STATE))
            if missing or unexpected:
                raise UserError(f"{self.folder}: the stored network does not fit; run again with store.mode=refresh.")
            saved = load_file(self.folder / HIDDEN) if (self.folder / HIDDEN).exists() else {}
            restore_hidden_buffers(self._network, saved)
        return self._network

    def _rebuilt(self) -> fx.GraphModule:
        config = self._setting.config
        return rebuild_sim(
            self._setting.built.module, self._setting.example(), scheme(config), leaf_modules=config.model.leaf_modules
        )
