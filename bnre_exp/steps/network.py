"""The network between two stages: in memory, or in a file from which it is taken up only if a stage needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from safetensors.torch import load_model, save_model
from torch import fx, nn

from bnre_exp.errors import UserError
from bnre_exp.quantsim.insert import rebuild_sim
from bnre_exp.steps.setting import Setting, scheme

STATE = "state.safetensors"


def save_state(folder: Path, network: nn.Module) -> None:
    """Write the network's parameters and buffers into a folder."""
    save_model(network, str(folder / STATE))


class Passing:
    """A network on its way from stage to stage: what a stage left, or the folder that holds its state.

    folder: where the state is, None if it was not stored.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._network: Optional[nn.Module] = setting.built.module
        self._is_sim = False
        self.folder: Optional[Path] = None

    def computed(self, network: nn.Module, folder: Optional[Path]) -> None:
        """A stage made this network, and its state was stored in ``folder``, if it was."""
        self._network, self.folder, self._is_sim = network, folder, isinstance(network, fx.GraphModule)

    def found(self, folder: Path, is_sim: bool) -> None:
        """A stage's result was found in ``folder``: a simulation, or the FP32 network."""
        self._network, self.folder, self._is_sim = None, folder, is_sim

    def take(self) -> nn.Module:
        """The network itself, taken up from its file if need be."""
        if self._network is None:
            if self.folder is None:
                raise RuntimeError("no network and no file of one")
            self._network = self._rebuilt() if self._is_sim else self._setting.built.module
            missing, unexpected = load_model(self._network, str(self.folder / STATE))
            if missing or unexpected:
                raise UserError(f"{self.folder}: the stored network does not fit; run again with store.mode=refresh.")
        return self._network

    def _rebuilt(self) -> fx.GraphModule:
        config = self._setting.config
        return rebuild_sim(
            self._setting.built.module, self._setting.example(), scheme(config), leaf_modules=config.model.leaf_modules
        )
