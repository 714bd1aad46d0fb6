"""Is one network better than another on the same samples, or could the difference be that of these samples alone?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bnre_exp.errors import UserError

RESAMPLES = 4000
_BATCH = 2**22  # indices of resamples that are in memory at a time


@dataclass(frozen=True)
class PairedTest:
    """The change of the mean score from one network to another on the same samples.

    change: mean of the second's scores less that of the first's; low, high: its interval at ``confidence``; p_value:
    two-sided, of no change; better, worse: samples on which the second network scores higher or lower; count: all
    samples; test: how it was told.
    """

    change: float
    low: float
    high: float
    p_value: float
    better: int
    worse: int
    count: int
    test: str
    confidence: float = 0.95

    @property
    def is_sure(self) -> bool:
        """Whether the change is told apart from none at the confidence that the interval has."""
        return self.p_value < 1 - self.confidence


def paired_test(before: Tensor, after: Tensor, *, confidence: float = 0.95, seed: int = 0) -> PairedTest:
    """Compare two networks by their scores ``[N]`` of the same samples, the higher the better.

    Scores that are 0 or 1 (wrong, right) are compared by McNemar's test, exact (the binomial distribution of the pairs
    that differ), with the adjusted Wald interval of Bonett and Price (2012); others by a paired bootstrap of the mean
    (percentile interval, 4000 resamples drawn by ``seed``). A sample whose scores are equal, infinite ones too, has not
    changed.

    Raises ``UserError`` if there is no sample, the numbers of samples differ, or a score is not a number.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise UserError(
            f"scores: {list(before.shape)} and {list(after.shape)}; expected one of each sample, [N] twice."
        )
    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence}; expected a number between 0 and 1.")
    first, second = before.detach().double().cpu().numpy(), after.detach().double().cpu().numpy()
    if np.isnan(first).any() or np.isnan(second).any():
        raise UserError("scores: some are not a number (NaN), so that networks cannot be compared by them.")
    is_binary = all(np.isin(scores, (0.0, 1.0)).all() for scores in (first, second))
    return (_mcnemar if is_binary else _bootstrap)(first, second, confidence, seed)


def _counts(first: np.ndarray, second: np.ndarray) -> tuple[int, int, int]:
    return int((second > first).sum()), int((second < first).sum()), len(first)


def _mcnemar(first: np.ndarray, second: np.ndarray, confidence: float, seed: int) -> PairedTest:
    from scipy import stats  # takes a while

    better, worse, count = _counts(first, second)
    p_value = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    gained, lost = (better + 1) / (count + 2), (worse + 1) / (count + 2)
    error = math.sqrt((gained + lost - (gained - lost) ** 2) / (count + 2))
    half = float(stats.norm.ppf((1 + confidence) / 2)) * error
    low, high = max(gained - lost - half, -1.0), min(gained - lost + half, 1.0)
    return PairedTest((better - worse) / count, low, high, p_value, better, worse, count, "McNemar, exact", confidence)


def _bootstrap(first: np.ndarray, second: np.ndarray, confidence: float, seed: int) -> PairedTest:
    better, worse, count = _counts(first, second)
    with np.errstate(invalid="ignore"):
        changes = np.where(first == second, 0.0, second - first)
    changes = np.clip(changes, *_finite_range(changes))
    random, means = np.random.default_rng(seed), list[np.ndarray]()
    at_a_time = max(1, _BATCH // count)
    for start in range(0, RESAMPLES, at_a_time):
        drawn = random.integers(0, count, (min(at_a_time, RESAMPLES - start), count))
        means.append(changes[drawn].mean(axis=1))
    found = np.concatenate(means)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    beyond = min(int((found <= 0).sum()), int((found >= 0).sum()))
    p_value = min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1))
    return PairedTest(
        float(changes.mean()), float(low), float(high), p_value, better, worse, count, "paired bootstrap", confidence
    )


def _finite_range(changes: np.ndarray) -> tuple[float, float]:
    """Where a score is infinite (the PSNR of an image that is exactly right), the largest change that is finite
    stands for its change."""
    finite = changes[np.isfinite(changes)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (-1.0, 1.0)
