"""What a training does besides following gradients: batch norms that stand still or move slowly, an average of the
weights, weights that are kept from oscillating."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp.algorithms.averaging import Average, average_of, kept
from bnre_exp.algorithms.feeding import is_whole
from bnre_exp.errors import UserError


class Watch(Protocol):
    """What looks at weights step by step, and may hold them: :func:`~bnre_exp.track_oscillations` makes one."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All that a step changes in it, in place, for snapshots."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values that must be the same when a training goes on."""

    @property
    def needs_end(self) -> bool:
        """Whether it follows a schedule, for which the number of steps has to be known."""

    def before_step(self, progress: float) -> None:
        """Called when gradients are there. progress: the part of all steps that is done with this one, in (0, 1]."""

    def after_step(self, progress: float) -> None:
        """Called once after each step of the optimizer."""

    def hold(self) -> None:
        """Put weights that are held where they are held, since all have been moved."""

    def shares(self) -> Mapping[str, float]:
        """Parts of the weights: ``oscillating``, and ``frozen`` if any may be."""


@dataclass(frozen=True)
class Control:
    """The arguments of :func:`~bnre_exp.train` of the same names. Raises ``UserError`` for one that makes no sense."""

    freeze_bn_epoch: int | None = None
    bn_momentum: float | None = None
    ema_decay: float | None = None
    oscillations: Watch | None = None

    def __post_init__(self) -> None:
        epoch = self.freeze_bn_epoch
        if epoch is not None and not (is_whole(epoch) and epoch >= 1):
            raise UserError(f"freeze_bn_epoch={epoch!r}: expected a whole number of at least 1, or None for never.")
        if not _is_number(self.bn_momentum) or (self.bn_momentum is not None and not 0 < self.bn_momentum <= 1):
            raise UserError(f"bn_momentum={self.bn_momentum!r}: expected more than 0 and at most 1, or None.")
        if not _is_number(self.ema_decay) or (self.ema_decay is not None and not 0 < self.ema_decay < 1):
            raise UserError(f"ema_decay={self.ema_decay!r}: expected more than 0 and less than 1, or None.")

    def settings(self) -> dict[str, Any]:
        """What must be the same when a training goes on: JSON values, of what is asked for alone."""
        own = {name: getattr(self, name) for name in ("freeze_bn_epoch", "bn_momentum", "ema_decay")}
        watched = {} if self.oscillations is None else dict(self.oscillations.settings)
        return {**{name: value for name, value in own.items() if value is not None}, **watched}

    def average(self, model: nn.Module) -> Average | None:
        """The average of the weights, if one is asked for."""
        return None if self.ema_decay is None else average_of(model, self.ema_decay)

    @property
    def needs_end(self) -> bool:
        """Whether anything here follows a schedule, for which the number of steps has to be known."""
        return self.oscillations is not None and self.oscillations.needs_end

    def check_steps(self, steps: int | None) -> None:
        """Raise ``UserError`` if the number of steps is needed and not known."""
        if steps is None and self.needs_end:
            raise UserError(
                "train: the data loader has no length, which the schedule of oscillations= needs; pass "
                "steps_per_epoch (an epoch is that many batches)."
            )

    @contextmanager
    def of_batch_norms(self, model: nn.Module, epoch: int) -> Iterator[None]:
        """Within the block, which trains an epoch (counted from 1), batch norms are as asked for; then as before."""
        is_frozen = self.freeze_bn_epoch is not None and epoch >= self.freeze_bn_epoch
        with momentum_of_batch_norms(model, self.bn_momentum), frozen_statistics(model, is_frozen):
            yield


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def tensors_of(average: Average | None, watch: Watch | None) -> dict[str, Tensor]:
    """All tensors of the two that a step changes, by name, for snapshots."""
    found = {f"oscillations/{name}": tensor for name, tensor in watch.tensors.items()} if watch is not None else {}
    if average is not None:
        found.update({f"average/{name}": tensor for name, tensor in average.values.items()})
        found["average steps"] = average.steps
    return found


def write_average(average: Average | None, watch: Watch | None) -> None:
    """Give the network its average in place, and hold what is held: the average of a scale moves it."""
    if average is not None:
        average.write()
        if watch is not None:
            watch.hold()


@contextmanager
def averaged(average: Average | None, watch: Watch | None) -> Iterator[None]:
    """Within the block the network has its average; in the end its own weights again, bit for bit."""
    with ExitStack() as stack:
        if average is not None:
            stack.enter_context(kept(average.parameters))
            write_average(average, watch)
        yield


@contextmanager
def frozen_statistics(model: nn.Module, is_on: bool) -> Iterator[None]:
    """Within the block batch norms that are in training mode normalize by their running statistics, which stay as they
    are; gamma and beta are trained. Then they are in training mode again.

    This is for a network that is in training mode. That a user froze a batch norm (quantsim/tracing/frozen.py) is told
    from its mode, so no batch norm may be in another than its own outside of the block.
    """
    held = [bn for bn in batch_norms(model) if bn.training and bn.running_mean is not None] if is_on else []
    try:
        for bn in held:
            bn.training = False
        yield
    finally:
        for bn in held:
            bn.training = True


@contextmanager
def momentum_of_batch_norms(model: nn.Module, momentum: float | None) -> Iterator[None]:
    """Within the block the newest batch has this weight in all running statistics; then each has its own again. None:
    nothing changes."""
    before = [(bn, bn.momentum) for bn in batch_norms(model)] if momentum is not None else []
    try:
        for bn, _ in before:
            bn.momentum = momentum
        yield
    finally:
        for bn, own in before:
            bn.momentum = own


def batch_norms(model: nn.Module) -> list[Any]:
    """All batch norms that are modules."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
