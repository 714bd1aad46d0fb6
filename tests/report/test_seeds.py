"""Runs over seeds: means and standard deviations by hand, the test against SciPy."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from scipy import stats

from bnre_exp.report.comparison import (
    P_OVER_SEEDS,
    RunRow,
    comparison_columns,
    comparison_markdown,
    comparison_table,
)
from bnre_exp.report.seeds import over_seeds, p_value_of

STAGES = {"fp32": "FP32", "ptq": "quantized", "reest": "re-estimated"}


def row(seed: int, bits: int, before: float, after: float, status: str = "FINISHED", **metrics: float) -> RunRow:
    params = {"seed": str(seed), "quant.weight_bits": str(bits), "runtime.workers": str(seed)}
    found = {"ptq/top1": before, "reest/top1": after, "reest/delta_top1": after - before, **metrics}
    return RunRow(f"{bits}-{seed}", status, params, found if status == "FINISHED" else {})


ROWS = [row(0, 2, 0.1, 0.7), row(0, 4, 0.8, 0.9), row(1, 2, 0.2, 0.75), row(1, 4, 0.85, 0.9), row(2, 2, 0.12, 0.8)]


def test_rows_of_a_setting_become_one():
    two, four = over_seeds(ROWS)
    assert (two.name, four.name) == ("3 seeds", "2 seeds")
    assert two.params["seed"] == "0, 1, 2" and four.params["seed"] == "0, 1"
    assert two.metrics["ptq/top1"] == pytest.approx(0.14) and two.spreads["ptq/top1"] == pytest.approx(
        0.0529150, rel=1e-5
    )
    assert two.metrics["reest/delta_top1"] == pytest.approx((0.6 + 0.55 + 0.68) / 3)
    assert two.metrics[P_OVER_SEEDS] == pytest.approx(stats.ttest_1samp([0.6, 0.55, 0.68], 0).pvalue)


def test_the_table_shows_means_with_their_spread():
    rows = over_seeds([*ROWS, row(2, 4, 0.8, 0.93)])
    columns = comparison_columns(rows, STAGES)
    assert columns["weight_bits"] == ["2", "4"] and "seed" not in columns  # which are the same for both
    assert columns["quantized"] == ["0.1400 ± 0.0529", "0.8167 ± 0.0289"]
    assert columns["re-estimated"] == ["0.7500 ± 0.0500", "0.9100 ± 0.0173"]
    assert columns["change"] == ["+0.6100 ± 0.0656", "+0.0933 ± 0.0404"]
    assert columns["p over seeds"] == ["0.0038", "0.0572"]
    assert "**0.9100 ± 0.0173**" in comparison_markdown("sweep", rows, STAGES)


def test_runs_that_did_not_finish_and_single_ones_stay():
    failed = row(3, 4, 0, 0, status="FAILED")
    found = over_seeds([*ROWS[:2], failed])
    assert [one.name for one in found] == ["2-0", "4-0", "4-3"]
    alone = [row(0, 2, 0.1, 0.2), row(0, 3, 0.1, 0.2)]
    assert over_seeds(alone) == alone


def test_verdicts_that_differ_are_counted():
    words = ["helped", "no difference", "helped"]
    rows = [replace(row(seed, 2, 0.1, 0.7), verdict=word) for seed, word in enumerate(words)]
    assert over_seeds(rows)[0].verdict == "2 helped, 1 no difference"
    assert over_seeds(rows[::2])[0].verdict == "helped" and over_seeds(ROWS)[0].verdict == ""


def test_a_console_of_120_columns_shows_which_setting_a_row_is_and_every_spread():
    names = ["fp32", "ptq", "recal_only", "qat", "reest", "fold"]
    rows = [
        row(seed, bits, 0.1 * seed + 0.1, 0.7, **{f"{name}/top1": 0.5 + 0.01 * seed + 0.1 * bits for name in names})
        for bits in (2, 4) for seed in (0, 1)
    ]  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(comparison_table("sweep", over_seeds(rows), {name: name for name in names}))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert [line[0] for line in lines if line[1:2] == ["0.7050"] or line[1:2] == ["0.9050"]] == ["2", "4"]
    assert sum(line.count("±") for line in lines) == 14


def test_metrics_that_a_run_lacks_are_left_out():
    (joined,) = over_seeds([row(0, 2, 0.1, 0.7, other=1.0), row(1, 2, 0.1, 0.8)])
    assert "other" not in joined.metrics and joined.metrics["reest/top1"] == pytest.approx(0.75)


def test_changes_that_are_all_the_same():
    assert p_value_of([0.0, 0.0]) == 1.0 and p_value_of([0.1, 0.1, 0.1]) == 0.0
