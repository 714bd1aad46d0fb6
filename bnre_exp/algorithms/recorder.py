"""The statistics of every call of a network's batch norms, taken in while batches go through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from bnre_exp.algorithms.bn_statistics import Estimator, Statistics, check_count, input_of_call
from bnre_exp.algorithms.sampling import SamplingErrors
from bnre_exp.errors import UserError, few


class Recorder:
    """Feeds the statistics of every call of batch norms to an :class:`Estimator` each.

    names: of BN modules with running statistics. Those of all BNs lie side by side in memory, so that a batch in which
    each was called once is taken in by a few operations. with_errors: standard errors are kept, too.
    """

    def __init__(self, names: Mapping[Any, str], method: str, momentum: float, with_errors: bool = False) -> None:
        self.names = names
        self._groups: list[_Group] = []
        for key in dict.fromkeys(_kind(bn) for bn in names):
            self._groups.append(_Group([bn for bn in names if _kind(bn) == key], method, momentum, with_errors))
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
        _, count = input_of_call(args, kwargs)
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

    def errors(self) -> dict[str, float]:
        """The largest standard error of each BN that was called, by name, as :class:`SamplingErrors` has them."""
        found: dict[str, float] = {}
        for group in self._groups:
            found.update((self.names[bn], error) for bn, error in group.errors_of_layers())
        return found

    def results(self) -> dict[Any, Statistics]:
        """Of the BNs that were called, in the type of their running statistics."""
        return {bn: each.result(bn.running_mean.dtype) for bn, each in self.estimators.items() if each.calls}


class _Group:
    """BNs whose running statistics have one type and device. means, vars: of the last call of each; joint: the
    estimator of all, of which those of each BN are parts."""

    def __init__(self, bns: Sequence[Any], method: str, momentum: float, with_errors: bool) -> None:
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
        self._errors = SamplingErrors(self._of_channels([bn.eps for bn in bns])) if with_errors else None
        old = [*(bn.running_mean for bn in bns), *(bn.running_var for bn in bns)]
        # What is not finite survives its weight of zero.
        self._old = [x if bool(x.isfinite().all()) else torch.zeros_like(x) for x in old]

    def start(self) -> None:
        """The old statistics, which a module around a BN may read before that is called."""
        torch._foreach_copy_([*self.means, *self.vars], self._old)

    def take_in(self, calls: Mapping[Any, int], is_plain: bool) -> None:
        """The last calls of a batch. is_plain: they are the only ones."""
        estimators = list(self.estimators.values())
        if self._errors is not None:
            called = self._of_channels([int(bn in calls) for bn in self.estimators]) > 0
            self._errors.add(torch.cat(self.means), torch.cat(self.vars), called)
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

    def errors_of_layers(self) -> list[tuple[Any, float]]:
        """The BNs that were called, with the largest error of their channels."""
        if self._errors is None:
            return []
        errors = zip(self.estimators.items(), self._errors.of_layers(self._sizes.tolist()))
        return [(bn, error) for (bn, each), error in errors if each.calls]

    def _of_channels(self, values: Sequence[float]) -> Tensor:
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
