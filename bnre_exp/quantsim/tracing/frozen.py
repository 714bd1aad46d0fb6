"""Modules that stay in evaluation mode when their network is trained: batch norms that their user froze, above all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from bnre_exp.quantsim.wrappers import copied, unwrapped

MARK = "_stays_in_evaluation"  # of a module that a training found so; after it all modules are in evaluation mode
META = "stays_in_evaluation"  # of a traced network: the names


def frozen_modules(model: nn.Module) -> frozenset[str]:
    """Names of the modules that their user keeps in evaluation mode; nothing is changed.

    These are in evaluation mode though the network is in training mode, or stay in it when the network is put into
    training mode (a ``train`` of its own, as mmcv's ``norm_eval`` has), or were so when :func:`train_mode` met them. In
    a network that is in evaluation mode as a whole, ``bn.eval()`` leaves no trace.
    """
    modules = dict(model.named_modules())
    modules.pop("")
    names = {name for name, m in modules.items() if not m.training and (model.training or vars(m).get(MARK))}
    if any(type(m).train is not nn.Module.train for m in model.modules()):
        trained = copied(model)
        trained.train()  # such a method may do other things as well, and need not return the network
        names |= {name for name, m in trained.named_modules() if name and not m.training}
    return frozenset(names)


def train_mode(model: nn.Module) -> list[nn.Module]:
    """Put a network into training mode, in place, but for modules that are in evaluation mode while the network is not
    (they are remembered, as training ends in evaluation mode). The network is what is in its wrappers, which are in
    training mode whenever they are new. Returns the modules that the network's own ``train`` would have changed."""
    root = unwrapped(model)
    held = [m for m in root.modules() if not m.training and (root.training or vars(m).get(MARK)) and m is not root]
    for module in root.modules():
        vars(module).pop(MARK, None)  # its user may have put it into training mode since
    model.train()
    changed = [module for module in held if module.training]
    for module in held:
        module.training = False
        vars(module)[MARK] = True
    return changed


def set_mode(model: nn.Module, training: bool, frozen: Iterable[str]) -> None:
    """Put a network into a mode, in place, but for the modules in ``frozen``, which are in evaluation mode."""
    model.train(training)
    hold(model, frozen)


def hold(model: Any, names: Iterable[str]) -> None:
    """Put modules into evaluation mode, by name, in place."""
    modules = dict(model.named_modules()) if names else {}
    for name in names:
        if name in modules:
            modules[name].training = False
