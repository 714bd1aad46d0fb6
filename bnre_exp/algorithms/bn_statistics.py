"""Statistics of batch norms over several batches, of torch modules and ONNX models alike: the estimators, the loop over
batches, and how new statistics are written and taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp.algorithms.feeding import Passes, check_num_batches, take_batches
from bnre_exp.errors import UserError, few
from bnre_exp.progress import Progress

METHODS = ("batch_average", "pooled", "ema")

Statistics = tuple[Tensor, Tensor]  # running_mean, running_var, each [C]
H = TypeVar("H", bound="StatisticsHandle")
K = TypeVar("K")  # whatever stands for a batch norm


@dataclass(kw_only=True)
class StatisticsHandle:
    """Undoes a re-estimation: ``remove()``, or leaving a ``with`` block, puts the old statistics back.

    num_batches: batches used; passes: passes over the loader that they took.
    """

    num_batches: int
    passes: int
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
    return any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())


@torch.no_grad()
def write_statistics(bn: Any, statistics: Statistics) -> Callable[[], Any]:
    """Put statistics in place of those of a BN module; returns what puts the old ones back."""
    before = bn.running_mean.clone(), bn.running_var.clone()
    bn.running_mean.copy_(statistics[0])
    bn.running_var.copy_(statistics[1])
    return lambda: write_statistics(bn, before)


class Recorder:
    """Feeds the statistics of every call of batch norms to an :class:`Estimator` each.

    names: of BN modules with running statistics. Those of all BNs lie side by side in memory, so that a batch in which
    each was called once is taken in by a few operations.
    """

    def __init__(self, names: Mapping[Any, str], method: str, momentum: float) -> None:
        self.names = names
        self._groups: list[_Group] = []
        for key in dict.fromkeys(_kind(bn) for bn in names):
            self._groups.append(_Group([bn for bn in names if _kind(bn) == key], method, momentum))
        self.estimators = {bn: estimator for group in self._groups for bn, estimator in group.estimators.items()}
        self._calls: dict[Any, int] = {}  # of a batch: the values a channel of the last call of each BN
        self._is_plain = True  # no BN was called twice in the batch

    @contextmanager
    def batch(self, known: Mapping[Any, int] | None = None) -> Iterator[None]:
        """BNs in training mode with momentum 1, on running statistics of the recorder that hold those of the last call;
        in the end each is as before. The calls of the block are taken in, unless it fails.

        known: what :meth:`plain_calls` said of a batch that calls the same; no hooks are needed then.
        """
        tracked = torch.zeros((), dtype=torch.long)
        self._calls = dict(known or {})
        self._is_plain = True
        with ExitStack() as stack:
            for group in self._groups:
                group.start()
                scratch = tracked.to(group.means[0].device)
                for bn, mean, var in zip(group.estimators, group.means, group.vars):
                    now = {"running_mean": mean, "running_var": var, "momentum": 1.0, "training": True}
                    if bn.num_batches_tracked is not None:
                        now["num_batches_tracked"] = scratch
                    stack.callback(_exchange, bn, _exchange(bn, now))
                    if known is None:
                        stack.callback(bn.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            yield
            for group in self._groups:
                group.take_in(self._calls, self._is_plain)

    def plain_calls(self) -> dict[Any, int] | None:
        """Values a channel of each BN that the last batch called, if it called none twice."""
        return dict(self._calls) if self._is_plain else None

    def _before(self, bn: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["input"]
        count = int(x.numel() // x.shape[1]) if x.shape[1] else 0
        check_count(self.names[bn], count)
        if bn in self._calls:
            self._is_plain = False
            self.estimators[bn].add(bn.running_mean, bn.running_var, self._calls[bn])
        self._calls[bn] = count

    def check_finite(self, batch: int) -> None:
        """Raise ``UserError`` naming batch norms whose statistics are not finite once ``batch`` (from 1) was taken in;
        0: before the first. A device answers once, unless something is wrong."""
        if all(group.joint.is_finite() for group in self._groups):
            return
        bad = few([self.names[bn] for bn, estimator in self.estimators.items() if not estimator.is_finite()])
        if batch == 0:
            raise UserError(
                f"method=ema starts from the present statistics, and those of {bad} are not finite; use batch_average "
                "or pooled."
            )
        raise UserError(
            f"Re-estimation gave statistics that are not finite for {bad}, in batch {batch} (from 1); the old ones are "
            "kept. Look for NaN in that batch or the weights, and for values that its type does not hold."
        )

    def results(self) -> dict[Any, Statistics]:
        """Of the BNs that were called, in the type of their running statistics."""
        return {bn: each.result(bn.running_mean.dtype) for bn, each in self.estimators.items() if each.calls}


class _Group:
    """BNs whose running statistics have one type and device. means, vars: of the last call of each; joint: the
    estimator of all, of which those of each BN are parts."""

    def __init__(self, bns: Sequence[Any], method: str, momentum: float) -> None:
        sizes = [bn.running_mean.numel() for bn in bns]
        self.joint = Estimator(
            method, momentum, torch.cat([bn.running_mean for bn in bns]), torch.cat([bn.running_var for bn in bns])
        )
        self.means, self.vars = ([torch.zeros_like(bn.running_mean) for bn in bns] for _ in range(2))
        self.estimators = {bn: Estimator(method, momentum, bn.running_mean, bn.running_var) for bn in bns}
        for each, mean, spread in zip(
            self.estimators.values(), self.joint.mean.split(sizes), self.joint.spread.split(sizes)
        ):
            each.mean, each.spread = mean, spread
        self._sizes = torch.tensor(sizes)
        old = [*(bn.running_mean for bn in bns), *(bn.running_var for bn in bns)]
        # What is not finite survives its weight of zero.
        self._old = [x if bool(x.isfinite().all()) else torch.zeros_like(x) for x in old]

    def start(self) -> None:
        """The old statistics, which a module around a BN may read before that is called."""
        torch._foreach_copy_([*self.means, *self.vars], self._old)

    def take_in(self, calls: Mapping[Any, int], is_plain: bool) -> None:
        """The last calls of a batch. is_plain: they are the only ones."""
        estimators = list(self.estimators.values())
        are_alike = is_plain and len({each.calls for each in estimators}) == 1
        if not are_alike or any(bn not in calls for bn in self.estimators):
            for (bn, each), mean, var in zip(self.estimators.items(), self.means, self.vars):
                if bn in calls:
                    each.add(mean, var, calls[bn])
            return
        counts = [calls[bn] for bn in self.estimators]
        self.joint.calls = estimators[0].calls
        self.joint.count = self._of_channels([each.count for each in estimators])
        self.joint.add(torch.cat(self.means), torch.cat(self.vars), self._of_channels(counts))
        for each, count in zip(estimators, counts):
            each.calls += 1
            each.count += count

    def _of_channels(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(self._sizes).to(self.joint.mean.device)


def _kind(bn: Any) -> tuple[Any, Any]:
    return bn.running_mean.device, bn.running_mean.dtype


def _exchange(bn: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Put values in place of a module's attributes, buffers or parameters, whatever each is; returns the old ones. (To
    set attributes of modules costs ten times that.)"""
    old = {}
    for name, value in values.items():
        place = next(place for place in (vars(bn), bn._buffers, bn._parameters) if name in place)
        old[name], place[name] = place[name], value
    return old
