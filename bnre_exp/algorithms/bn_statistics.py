"""Statistics of batch norms over several batches, of torch modules and ONNX models alike: the estimators, the loop over
batches, and how new statistics are written and taken back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp.algorithms.feeding import Passes, check_num_batches, is_whole, take_batches
from bnre_exp.errors import UserError, few
from bnre_exp.progress import Progress

METHODS = ("batch_average", "pooled", "ema")

Statistics = tuple[Tensor, Tensor]  # running_mean, running_var, each [C]
H = TypeVar("H", bound="StatisticsHandle")
K = TypeVar("K")  # whatever stands for a batch norm


@dataclass(kw_only=True)
class StatisticsHandle:
    """Undoes a re-estimation: ``remove()``, or leaving a ``with`` block, puts the old statistics back.

    num_batches: batches used; loader_passes: passes over the loader that they took.
    """

    num_batches: int
    loader_passes: int
    _undo: ExitStack = field(repr=False)

    def remove(self) -> None:
        """Restore the statistics of before, bit for bit. A second call does nothing."""
        self._undo.close()

    def __enter__(self: H) -> H:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Estimator:
    """Statistics of one BN from the mean and unbiased variance of each of its calls, accumulated in float64.

    Or of several at once, that are called equally often; counts are then those of each channel, ``[C]`` in float64.
    """

    def __init__(self, method: str, momentum: float, mean: Tensor, var: Tensor) -> None:
        self.method, self.momentum = method, momentum
        self.calls = 0
        self.count: Any = 0
        start = (mean, var) if method == "ema" else (torch.zeros_like(mean), torch.zeros_like(var))
        self.mean, self.spread = (values.to(torch.float64, copy=True) for values in start)

    def add(self, mean: Tensor, var: Tensor, count: Any) -> None:
        """Take in one call over ``count`` values a channel."""
        mean, var = mean.double(), var.double()
        self.calls += 1
        if self.method == "ema":
            self.mean += self.momentum * (mean - self.mean)
            self.spread += self.momentum * (var - self.spread)
        elif self.method == "batch_average":
            self.mean += (mean - self.mean) / self.calls
            self.spread += (var - self.spread) / self.calls
        else:  # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm", 1979
            total = self.count + count
            shift = mean - self.mean
            self.mean += shift * (count / total)
            self.spread += var * (count - 1) + shift.square() * (self.count * count / total)
            self.count = total

    def is_finite(self) -> bool:
        return bool((self.mean + self.spread).isfinite().all())

    def result(self, dtype: torch.dtype) -> Statistics:
        """Mean and unbiased variance so far; later calls leave them alone."""
        spread = self.spread / (self.count - 1) if self.method == "pooled" else self.spread
        return self.mean.to(dtype, copy=True), spread.to(dtype, copy=True)


def check_arguments(method: str, num_batches: int) -> None:
    """Raise ``UserError`` for a method that there is not, and for no batches."""
    if method not in METHODS:
        raise UserError(f"method={method!r}: expected one of {', '.join(METHODS)}.")
    if num_batches == 0:
        raise UserError("num_batches=0: expected at least 1; to leave re-estimation out, do not call it.")
    check_num_batches(num_batches)


@dataclass(frozen=True)
class Estimation:
    """How statistics are estimated, as arguments of :func:`~bnre_exp.reestimate_bn_stats`. Raises ``UserError`` for one
    that is out of its range, or that its method has no use for."""

    method: str
    momentum: float
    tolerance: float | None = None
    prior: float = 0.0
    passes: int = 1
    curve: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise UserError(f"tolerance={self.tolerance!r}: expected a number above 0, such as 0.05; None: no stop.")
        if self.tolerance is not None and self.method == "ema":
            raise UserError("tolerance: method=ema forgets old batches and gets no surer; use batch_average or pooled.")
        if not 0 <= self.prior < math.inf:
            raise UserError(f"prior={self.prior!r}: expected a number of samples, 0 or more.")
        if not is_whole(self.passes) or self.passes < 1:
            raise UserError(f"passes={self.passes!r}: expected at least 1, as a whole number.")
        if not all(is_whole(number) and number >= 1 for number in self.curve):
            raise UserError(f"curve={list(self.curve)}: expected numbers of batches, each at least 1.")

    def beside(self, before: Mapping[K, Statistics], new: Mapping[K, Statistics], samples: int) -> dict[K, Statistics]:
        """New statistics, of so many samples, beside the old ones, which count as ``prior`` samples."""
        if not self.prior:
            return dict(new)
        weight = self.prior / (self.prior + samples)
        return {
            bn: (_mixed(weight, before[bn][0], mean), _mixed(weight, before[bn][1], var))
            for bn, (mean, var) in new.items()
        }


def _mixed(weight: float, old: Tensor, new: Tensor) -> Tensor:
    return (weight * old.double() + (1 - weight) * new.double()).to(new.dtype)


def input_of_call(args: Any, kwargs: Any) -> tuple[Tensor, int]:
    """What a call gives a batch norm, as a hook sees it, and how many values of a channel that has."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x, int(x.numel() // x.shape[1]) if x.shape[1] else 0


def check_count(name: str, count: int) -> None:
    """Raise ``UserError`` naming a batch norm that is called with ``count`` values a channel, if that is too few."""
    if count < 2:
        raise UserError(
            f"The batch norm {name} gets a batch with one value per channel, which has no variance; use larger "
            "batches (drop_last=True drops a short last one)."
        )


def observe_batches(
    loader: Iterable[Any], num_batches: int, observe: Callable[[Any], None], count: Passes, progress: Progress
) -> Iterator[int]:
    """Give ``num_batches`` batches to ``observe``, and yield after each how many those were; ``count`` follows.

    observe: feeds one batch to a network and adds each call of each of its batch norms to that one's
    :class:`Estimator`. Between two batches the network is as it was, and every estimator may be asked for its result.
    Raises ``UserError`` as :func:`take_batches` does.
    """
    for batch in progress(take_batches(loader, num_batches, count), "re-estimate", num_batches):
        observe(batch)
        yield count.batches


def commit(
    names: Mapping[K, str], results: Mapping[K, Statistics], write: Callable[[K, Statistics], Callable[[], Any]]
) -> ExitStack:
    """Write the results of all batch norms, or of none; returns what undoes it.

    names: of the batch norms; write: puts statistics in place of one's old ones, and returns what puts those back.
    Raises ``UserError`` naming batch norms whose results are not finite.
    """
    bad = [names[bn] for bn, statistics in results.items() if not all(bool(x.isfinite().all()) for x in statistics)]
    if bad:
        raise UserError(
            f"Re-estimation gave statistics that are not finite for {few(bad)}; the old ones are kept. Look for NaN "
            "in the data or weights, and for values that its type does not hold."
        )
    with ExitStack() as undo:
        for bn, statistics in results.items():
            undo.callback(write(bn, statistics))
        return undo.pop_all()


def has_running_statistics(model: nn.Module) -> bool:
    """Whether there is anything to re-estimate."""
    return bool(names_with_statistics(model))


def names_with_statistics(model: nn.Module) -> dict[Any, str]:
    """The batch norms that have running statistics, with their names."""
    bns: dict[Any, str] = {module: name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {bn: name for bn, name in bns.items() if bn.running_mean is not None and bn.running_var is not None}


@torch.no_grad()
def write_statistics(bn: Any, statistics: Statistics) -> Callable[[], Any]:
    """Put statistics in place of those of a BN module; returns what puts the old ones back."""
    before = bn.running_mean.clone(), bn.running_var.clone()
    bn.running_mean.copy_(statistics[0])
    bn.running_var.copy_(statistics[1])
    return lambda: write_statistics(bn, before)
