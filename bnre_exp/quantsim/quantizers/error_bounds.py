"""Between which bounds the rounding error of a sample lies on any integer grid, from a histogram instead of the values.

A search over ranges needs the error itself only of the few candidates that these bounds leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

BINS = 2**15  # over 2^8 levels: a grid's bounds lie some 1e-3 of its error apart
FLOAT = 2.0**-20  # what rounding in float32 adds to a value's error at most, as a part of the value; several times over
SUM = 1e-4  # the same of the mean of squared errors
DOUBLE = 1e-11  # and of running sums over a sample in float64


@dataclass(frozen=True)
class Histogram:
    """A sample in ``BINS`` bins from ``low``, ``width`` wide each. counts, sums: of the values below each of the
    BINS + 1 bin edges; energy: sum of all squares; reach: largest magnitude."""

    low: float
    width: float
    counts: np.ndarray
    sums: np.ndarray
    energy: float
    reach: float


def histogram(values: Tensor) -> Histogram | None:
    """The histogram of a sample ``[n]``; None of one with a single value, or values that are not finite."""
    x = values.double().numpy()
    low, high = float(x.min()), float(x.max())
    if not 0 < high - low < math.inf:
        return None
    width = (high - low) / BINS
    bins = ((x - low) / width).astype(np.int64).clip(max=BINS - 1)
    counts, sums = np.bincount(bins, minlength=BINS), np.bincount(bins, x, BINS)
    below = [np.concatenate(([0], np.cumsum(part))) for part in (counts, sums)]
    energy = float(np.square(x).sum())  # not x @ x: threads of BLAS wait for cores on which those of torch spin
    return Histogram(low, width, below[0], below[1], energy, max(-low, high))


def error_bounds(known: Histogram, grids: Sequence[tuple[float, int]], levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of a sample's squared error, as float32 computes it, on each of ``grids``.

    grids: scale and zero point, of ``levels`` codes from 0. Each value goes to the nearest level. A border between two
    levels is moved to the nearest edge of a bin: what lies between is ``scale * width`` worse at most, never better.
    """
    scale, zero = (np.array(part, dtype=np.float64)[:, None] for part in zip(*grids))
    level = (np.arange(levels) - zero) * scale  # [grids, levels]
    border = (level[:, :-1] + scale / 2 - known.low) / known.width  # [bins]
    edge = border.round().clip(0, BINS).astype(np.int64)
    count, total = (_between(sums, edge) for sums in (known.counts, known.sums))
    error = known.energy - 2 * (level * total).sum(axis=1) + (level**2 * count).sum(axis=1)
    crossed = np.floor(border).clip(0, BINS - 1).astype(np.int64)
    near = (known.counts[crossed + 1] - known.counts[crossed]).sum(axis=1)
    size = np.sqrt(known.energy)
    noise = DOUBLE * np.maximum(np.abs(level).max(axis=1), known.reach) * size * math.sqrt(float(known.counts[-1]))
    low = np.sqrt((error - near * scale[:, 0] * known.width - noise).clip(min=0)) - FLOAT * size
    high = np.sqrt((error + noise).clip(min=0)) + FLOAT * size
    return low.clip(min=0) ** 2 * (1 - SUM), high**2 * (1 + SUM)


def _between(sums: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """What lies below the first border, between each two, and above the last one, of each row."""
    first, last = np.zeros((len(edge), 1)), np.full((len(edge), 1), sums[-1])
    return np.diff(np.concatenate([first, sums[edge], last], axis=1), axis=1)
