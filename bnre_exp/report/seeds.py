"""Runs that differ in the seed alone, taken together: means, standard deviations, and whether a change holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev

from bnre_exp.report.comparison import INCIDENTAL, P_OVER_SEEDS, SEED, RunRow, differing_params, number


def over_seeds(rows: Sequence[RunRow]) -> list[RunRow]:
    """One row for all finished runs that differ in nothing but the seed; others stay as they are.

    Such a row has the mean of every metric that all of its runs have, the standard deviation (n - 1) in ``spreads``,
    and, where re-estimation changed the headline metric, the p-value of a paired t-test over the seeds of no change.
    """
    if SEED not in differing_params(rows):
        return list(rows)
    groups: dict[tuple[tuple[str, str], ...], list[RunRow]] = {}
    for row in rows:
        others = {name: text for name, text in row.params.items() if name != SEED and not INCIDENTAL.fullmatch(name)}
        alone = (("run", row.name), ("seed", row.params.get(SEED, ""))) if row.status != "FINISHED" else ()
        groups.setdefault((*sorted(others.items()), *alone), []).append(row)
    return [_joined(group) if len(group) > 1 else group[0] for group in groups.values()]


def _joined(rows: Sequence[RunRow]) -> RunRow:
    seeds = sorted((row.params.get(SEED, "") for row in rows), key=lambda text: (number(text) or 0.0, text))
    shared = [name for name in rows[0].metrics if all(math.isfinite(row.metrics.get(name, math.nan)) for row in rows)]
    values = {name: [row.metrics[name] for row in rows] for name in shared}
    means = {name: mean(found) for name, found in values.items()}
    changes = values.get(f"reest/delta_{rows[0].headline.name}")
    if changes is not None:
        means[P_OVER_SEEDS] = p_value_of(changes)
    return replace(
        rows[0], name=f"{len(rows)} seeds", params={**rows[0].params, SEED: ", ".join(seeds)}, metrics=means,
        spreads={name: stdev(found) for name, found in values.items()}, overrides="", folder="",
        verdict=_joined_verdict([row.verdict for row in rows]),
    )  # fmt: skip


def _joined_verdict(words: Sequence[str]) -> str:
    """The word of all; how many runs have which, where they differ: 2 helped, 1 no difference."""
    counted = Counter(word for word in words if word)
    if len(set(words)) == 1:
        return words[0]
    return ", ".join(f"{count} {word}" for word, count in counted.items())


def p_value_of(changes: Sequence[float]) -> float:
    """Two-sided p-value of Student's t-test of no change. Of changes that are all alike it is 0 (1 if they are 0)."""
    if len(set(changes)) == 1:
        return 1.0 if changes[0] == 0 else 0.0
    from scipy import stats  # takes a while

    return float(stats.ttest_1samp(changes, 0.0).pvalue)
