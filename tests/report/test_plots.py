"""Plots: the right numbers, and files where there is something to see."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from bnre_exp.jobs.stages.table import HEADINGS
from bnre_exp.report.comparison import RunRow
from bnre_exp.report.plots import SizePoint, batches_series, bits_series, pareto_front, save_plots, size_points


def row(bits: object = 4, batches: int = 100, per_channel: bool = True, **metrics: float) -> RunRow:
    params = {
        "quant.weight_bits": str(bits),
        "reest.num_batches": str(batches),
        "quant.per_channel": str(per_channel).lower(),
    }
    named = {name.replace("_top1", "/top1").replace("_megabytes", "/megabytes"): v for name, v in metrics.items()}
    return RunRow(f"{bits}-{batches}", "FINISHED", params, named)


GRID = [
    row(8, 10, ptq_top1=0.8, recal_only_top1=0.81, reest_top1=0.88),
    row(2, 0, ptq_top1=0.1),
    row(2, 10, ptq_top1=0.1, recal_only_top1=0.12, reest_top1=0.7),
    row(8, 0, ptq_top1=0.8),
    row(2, 100, ptq_top1=0.1, recal_only_top1=0.12, reest_top1=0.75),
    row("null", 10, ptq_top1=0.9, reest_top1=0.9),
    row(4, 10, fp32_top1=0.9),
]


def test_bits_one_line_before_and_one_for_each_number_of_batches_after():
    (series,) = bits_series(GRID)
    assert series.label == ""
    # where some runs were recalibrated for comparison, old ranges are no fair start
    assert series.before == [(2, 0.12), (8, 0.81), (math.inf, 0.9)]
    assert series.after == {"num_batches=10": [(2, 0.7), (8, 0.88), (math.inf, 0.9)], "num_batches=100": [(2, 0.75)]}
    assert bits_series(GRID[1:3]) == []
    assert bits_series([row(2, ptq_top1=0.5), row(4)]) == []  # a single point
    two = bits_series(
        [row(b, 10, p, qat_top1=b / 10, ptq_top1=0, reest_top1=0.9) for b in (2, 3) for p in (True, False)]
    )
    assert [one.label for one in two] == ["per_channel=false", "per_channel=true"]
    assert two[0].before == [(2, 0.2), (3, 0.3)] and two[0].after == {"": [(2, 0.9), (3, 0.9)]}


def test_batches_start_from_what_was_before():
    series = batches_series(GRID)
    assert [one.label for one in series] == ["weight_bits=2", "weight_bits=8", "weight_bits=null"]
    assert series[0].before == [(0, 0.12)] and series[0].after == {"": [(10, 0.7), (100, 0.75)]}
    assert batches_series(GRID[:4]) == []  # 0 and 10: no curve


def test_sizes_and_their_front():
    rows = [row(2, fold_top1=0.5, fold_megabytes=1.0), row(4, export_top1=0.9, fold_megabytes=2.0), row(8)]
    points = size_points(rows)
    assert points == [SizePoint(1.0, 0.5, "weight_bits=2"), SizePoint(2.0, 0.9, "weight_bits=4")]
    assert size_points([row(2, fold_top1=0.5, fold_megabytes=1.0), row(3, fold_top1=0.5, fold_megabytes=1.0)]) == []
    worse, same = SizePoint(2.0, 0.8, "worse"), SizePoint(3.0, 0.9, "larger, not better")
    assert pareto_front([same, worse, *points]) == points
    assert pareto_front([same, worse, *points], higher_is_better=False) == points[:1]


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (GRID, {"top1_by_bits", "top1_by_batches"}),
        ([row(2, fold_top1=0.5, fold_megabytes=1.0), row(4, fold_top1=0.6, fold_megabytes=2.0)], {"top1_by_size"}),
        ([row(4, 0, p, fp32_top1=0.9, ptq_top1=0.8) for p in (True, False)], {"top1_by_stage"}),
        ([row(4, fp32_top1=0.9)], set()),
        ([row(2), row(3)], set()),
        ([row(n, 0, fp32_top1=math.nan) for n in (4, 5)], set()),
        ([RunRow(str(n), "FINISHED", {"seed": str(n)}, {"ptq/top1": 0.5}) for n in range(15)], {"top1_by_stage"}),
    ],
)
def test_what_the_data_support_is_drawn(rows, names, tmp_path):
    paths = save_plots(rows, tmp_path, HEADINGS)
    assert {path.name for path in paths} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for path in paths:
        if path.suffix == ".png":
            pixels = np.asarray(Image.open(path).convert("L"))
            assert pixels.shape == (750, 1200) and (pixels < 128).mean() > 0.003
        else:
            assert "<script" not in path.read_text() and "http-equiv" not in path.read_text()
    again = tmp_path / "not" / "there"
    assert [path.read_bytes() for path in save_plots(rows, again, HEADINGS)] == [path.read_bytes() for path in paths]
