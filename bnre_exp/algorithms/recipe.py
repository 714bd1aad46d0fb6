"""How a training optimizes: its recipe, and what torch has for it."""

from __future__ import annotations

import numbers
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnre_exp.algorithms.feeding import is_whole
from bnre_exp.algorithms.speed import PRECISIONS
from bnre_exp.errors import UserError

MAX_EPOCHS = 1_000_000
LARGEST = sys.float_info.max
WARM_UP = 0.25  # part of the steps of one_cycle
CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("one_cycle", "cosine", "constant"),
    "precision": PRECISIONS,
}


@dataclass(frozen=True)
class Recipe:
    """What :func:`~bnre_exp.train` says of its arguments. Raises ``UserError`` for one that makes no sense."""

    epochs: int
    lr: float
    optimizer: str
    momentum: float
    weight_decay: float
    schedule: str
    label_smoothing: float
    precision: str

    def __post_init__(self) -> None:
        if not (is_whole(self.epochs) and 1 <= self.epochs <= MAX_EPOCHS):
            raise UserError(
                f"epochs={self.epochs!r}: expected at least 1, a whole number of up to {MAX_EPOCHS}; to leave training "
                "out, do not call it."
            )
        object.__setattr__(self, "epochs", int(self.epochs))
        self._number("lr", "0 or more", lambda x: x >= 0)
        self._number("weight_decay", "0 or more", lambda x: x >= 0)
        self._number("momentum", "0 or more and less than 1", lambda x: 0 <= x < 1)
        self._number("label_smoothing", "0 or more and less than 1", lambda x: 0 <= x < 1)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(choices)}.")

    def _number(self, name: str, expected: str, fits: Any) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_number and abs(value) <= LARGEST and fits(value)):
            raise UserError(f"{name}={value!r}: expected a number, {expected}.")
        object.__setattr__(self, name, float(value))


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of what is to be trained. Raises ``UserError`` if that is nothing, or cannot be trained."""
    for name, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise UserError(
                f"train: {name} has no shape yet: a lazy module gets it from its first batch; run the network once."
            )
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("train: no parameter of the network requires a gradient; call requires_grad_() on some.")
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise UserError(
            "train: the network was made under torch.inference_mode, and such tensors cannot be trained; make it "
            "outside of that, or train copy.deepcopy(model)."
        )
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    has_sparse = any(getattr(module, "sparse", False) is True for module in model.modules())
    can_be_fused = not has_sparse and all(map(_can_be_fused, trained))
    given: dict[str, Any] = {"lr": recipe.lr, "fused": can_be_fused or None}  # None: torch chooses the next best
    if recipe.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, **given)
    else:
        optimizer = torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.momentum > 0, **given)
    if given["fused"]:
        optimizer.register_step_pre_hook(_suit_fused)
    return optimizer


def _can_be_fused(parameter: Tensor) -> bool:
    """Whether torch updates it in one pass over its memory, several times as fast: that has to be without gaps."""
    is_dense = torch.empty_like(parameter).stride() == parameter.stride()
    return is_dense and parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")


def _suit_fused(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step. torch's fused ones take it for granted that gradients and momentum lie in memory as parameters do,
    and that momentum begins for all parameters at once, for which the first gradient of some comes too late."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            parameter.grad, state = _laid_out(parameter.grad, parameter), optimizer.state[parameter]
            if group.get("momentum") and "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            for name, tensor in state.items():
                state[name] = _laid_out(tensor, parameter) if tensor.shape == parameter.shape else tensor


def _laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The values in memory as those of the parameter."""
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def build_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int | None
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of the learning rate over so many steps; only a constant one can do without their number."""
    if recipe.schedule == "cosine" and steps is not None:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if recipe.schedule == "one_cycle" and steps is not None and steps > 1:  # a single step is done at the peak
        # torch divides by the length of the warm-up less one step: where that is zero, the warm-up is a bit longer.
        warm_up = WARM_UP if WARM_UP * steps != 1 else 1.2 * WARM_UP
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, steps, pct_start=warm_up, cycle_momentum=False)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
