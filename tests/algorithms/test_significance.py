"""Paired tests against SciPy, statsmodels' numbers and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from bnre_exp import UserError
from bnre_exp.algorithms.significance import PairedTest, paired_test


def pairs(both: int, better: int, worse: int, neither: int) -> PairedTest:
    before = torch.tensor([1.0] * both + [0.0] * better + [1.0] * worse + [0.0] * neither)
    after = torch.tensor([1.0] * both + [1.0] * better + [0.0] * worse + [0.0] * neither)
    return paired_test(before, after)


# p of statsmodels.stats.contingency_tables.mcnemar(table, exact=True), version 0.15.0
@pytest.mark.parametrize(
    ("table", "p_value"),
    [
        ((101, 121, 59, 33), 4.4344492637551645e-06),
        ((40, 5, 12, 3), 0.143463134765625),
        ((10, 0, 3, 0), 0.25),
        ((500, 7, 7, 26), 1.0),
        ((20, 0, 0, 4), 1.0),
    ],
)
def test_mcnemar_is_that_of_statsmodels(table, p_value):
    found = pairs(*table)
    _, better, worse, _ = table
    assert found.p_value == pytest.approx(p_value, rel=1e-9)
    assert (found.better, found.worse, found.count) == (better, worse, sum(table))
    assert found.change == pytest.approx((better - worse) / sum(table)) and found.test == "McNemar, exact"
    if better + worse:
        assert found.p_value == pytest.approx(stats.binomtest(better, better + worse).pvalue)


def test_the_interval_of_pairs_is_that_of_its_formula():
    """Bonett and Price (2012): Wald's, with one sample more in each cell of the pairs that differ."""
    found = pairs(60, 12, 4, 24)
    gained, lost = 13 / 102, 5 / 102
    half = 1.959963984540054 * math.sqrt((gained + lost - (gained - lost) ** 2) / 102)
    assert (found.low, found.high) == pytest.approx((gained - lost - half, gained - lost + half))
    assert found.low < found.change < found.high


def test_no_difference_still_has_an_interval():
    """Nothing changed on 500 images: a change of half a percent could have gone unseen, one of two percent not."""
    found = pairs(480, 0, 0, 20)
    assert (found.change, found.p_value, found.is_sure) == (0.0, 1.0, False)
    assert 0.002 < found.high == -found.low < 0.008


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("gained", "lost", "count"), [(0.02, 0.02, 200), (0.05, 0.01, 500), (0.3, 0.1, 60)])
def test_coverage_of_the_interval_of_pairs(gained, lost, count, confidence):
    random, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        better, worse, same = random.multinomial(count, [gained, lost, 1 - gained - lost])
        before = torch.tensor([0.0] * better + [1.0] * worse + [1.0] * same)
        after = torch.tensor([1.0] * better + [0.0] * worse + [1.0] * same)
        found = paired_test(before, after, confidence=confidence)
        covered += found.low <= gained - lost <= found.high
    assert confidence - 0.02 <= covered / 2000 <= 1


def test_mcnemar_is_seldom_sure_without_a_change():
    random, sure = np.random.default_rng(1), 0
    for _ in range(2000):
        better = random.binomial(30, 0.5)
        sure += pairs(10, better, 30 - better, 0).is_sure
    assert sure / 2000 <= 0.06


def scores(count: int, shift: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    before = random.gamma(3.0, size=count)
    return torch.from_numpy(before), torch.from_numpy(before + random.normal(shift, 0.4, count))


def test_the_bootstrap_is_that_of_scipy():
    before, after = scores(300, 0.05)
    found = paired_test(before, after)
    changes = (after - before).numpy()
    peer = stats.bootstrap((changes,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(3))
    assert found.change == pytest.approx(changes.mean()) and found.test == "paired bootstrap"
    width = peer.confidence_interval.high - peer.confidence_interval.low
    assert found.low == pytest.approx(peer.confidence_interval.low, abs=0.04 * width)
    assert found.high == pytest.approx(peer.confidence_interval.high, abs=0.04 * width)
    assert found.p_value == pytest.approx(stats.ttest_1samp(changes, 0).pvalue, rel=0.3)
    assert found == paired_test(before, after) != paired_test(before, after, seed=1)


def test_coverage_of_the_bootstrap():
    covered = 0
    for seed in range(300):
        found = paired_test(*scores(80, 0.1, seed))
        covered += found.low <= 0.1 <= found.high
    assert 0.90 <= covered / 300 <= 0.985


def test_many_samples_are_resampled_in_parts(monkeypatch):
    before, after = scores(50, 0.1)
    whole = paired_test(before, after)
    monkeypatch.setattr("bnre_exp.algorithms.significance._BATCH", 50 * 7)
    found = paired_test(before, after)
    assert found.change == whole.change and found.low == pytest.approx(whole.low, abs=0.02)


def test_infinite_scores_are_no_change_where_they_stay():
    before = torch.tensor([math.inf, 20.0, 21.0, 22.0, 20.0])
    after = torch.tensor([math.inf, 21.0, 22.0, math.inf, 20.0])
    found = paired_test(before, after)
    assert (found.better, found.worse) == (3, 0) and found.change == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (torch.zeros(3), torch.zeros(4), r"\[3\] and \[4\]; expected one of each sample"),
        (torch.zeros(0), torch.zeros(0), "expected one of each sample"),
        (torch.tensor([math.nan]), torch.zeros(1), "not a number"),
    ],
)
def test_scores_that_cannot_be_compared(before, after, message):
    with pytest.raises(UserError, match=message):
        paired_test(before, after)
