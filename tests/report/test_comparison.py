"""The comparison of runs: what differs, in which order, and nothing lost in the CSV."""

from __future__ import annotations

import csv
import io
import math

import pytest
from rich.console import Console

from bnre_exp.jobs.stages.table import HEADINGS
from bnre_exp.report.comparison import (
    RunRow,
    comparison_columns,
    comparison_csv,
    comparison_markdown,
    comparison_table,
    differing_params,
)
from bnre_exp.tasks import Headline


def row(bits: str = "4", batches: str = "100", status: str = "FINISHED", **metrics: float) -> RunRow:
    params = {
        "model.name": "resnet18", "quant.weight_bits": bits, "reest.num_batches": batches,
        "runtime.output_dir": f"/tmp/{bits}{batches}", "tracking.run_name": bits + batches, "store.mode": bits,
    }  # fmt: skip
    named = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return RunRow(f"run-{bits}-{batches}", status, params, named)


ROWS = [
    row("8", "0", fp32_top1=0.9, ptq_top1=0.89, fold_top1=0.89, fold_megabytes=2.25),
    row("null", "10", fp32_top1=0.9, ptq_top1=0.9),
    row("10", "100", fp32_top1=0.9, ptq_top1=0.88, reest_top1=0.1 + 0.2, reest_delta_top1=-0.58, fold_top1=0.3),
    row("8", "100", fp32_top1=0.9, ptq_top1=0.89, reest_top1=0.895, reest_delta_top1=0.005, fold_top1=0.8951),
]


def test_only_what_differs_and_matters_is_shown_in_numeric_order():
    assert differing_params(ROWS) == ["quant.weight_bits", "reest.num_batches"]
    columns = comparison_columns(ROWS, HEADINGS)
    assert list(columns) == [
        "weight_bits", "num_batches", "FP32", "quantized", "re-estimated", "change", "folded", "MB",
    ]  # fmt: skip
    assert list(zip(columns["weight_bits"], columns["num_batches"])) == [
        ("8", "0"), ("8", "100"), ("10", "100"), ("null", "10"),
    ]  # fmt: skip
    assert columns["re-estimated"] == ["–", "0.8950", "0.3000", "–"]
    assert columns["change"] == ["–", "+0.0050", "-0.5800", "–"] and columns["MB"][0] == "2.25"


def test_runs_that_did_not_finish_are_shown_with_what_they_have():
    columns = comparison_columns([row("2", status="FAILED"), row("3", fp32_top1=math.nan)], HEADINGS)
    assert columns["status"] == ["FAILED", "FINISHED"] and columns["FP32"] == ["–", "nan"]
    assert list(comparison_columns([row("2", fp32_top1=0.5)], HEADINGS)) == ["run", "FP32"]
    for function in (lambda rows: comparison_columns(rows, HEADINGS), comparison_csv):
        with pytest.raises(ValueError, match="no runs"):
            function([])


def test_runs_from_before_there_were_tasks_compare_as_classification():
    known = {"quant.weight_bits": "4", "dataset.num_classes": "10"}
    task = {"task._target_": "bnre_exp.tasks.Classification", "task.kwargs.num_classes": "10"}
    before, now = RunRow("a", "FINISHED", known, {}), RunRow("b", "FINISHED", {**known, **task}, {})
    assert differing_params([before, now]) == []
    other = RunRow("c", "FINISHED", {**known, "task._target_": "mytask.Number"}, {})
    assert differing_params([before, now, other]) == ["task._target_"]


def test_names_are_short_where_that_is_clear():
    one = RunRow("a", "FINISHED", {"train.lr": "1", "qat.lr": "1", "seed": "0"}, {})
    other = RunRow("b", "FINISHED", {"train.lr": "2", "qat.lr": "2", "seed": "1"}, {})
    assert list(comparison_columns([one, other], HEADINGS)) == ["train.lr", "qat.lr", "seed"]


def test_the_best_of_each_accuracy_is_bold():
    text = comparison_markdown("a | b", ROWS, HEADINGS)
    assert text.startswith("# a | b\n") and "**0.8951**" in text and "**0.8950**" in text and text.count("**") == 6
    assert "**0.9000** |" in text  # of quantized; FP32 is the same everywhere
    console = Console(record=True, width=120, force_terminal=True, file=io.StringIO())
    console.print(comparison_table("title", ROWS, HEADINGS))
    styled = console.export_text(styles=True)
    assert "\x1b[1m0.8951\x1b[0m" in styled and "\x1b[1m0.8900\x1b[0m" not in styled


def test_where_lower_is_better_the_lowest_is_bold_and_other_metrics_have_columns_of_their_own():
    error = Headline("mae", "mean error", higher_is_better=False)
    rows = [
        RunRow(bits, "FINISHED", {"quant.weight_bits": bits}, {"fp32/mae": 0.5, "fold/mae": value}, error)
        for bits, value in (("2", 0.75), ("4", 0.625))
    ]
    assert "**0.6250**" in comparison_markdown("t", rows, HEADINGS)
    both = [*rows, row("8", fp32_top1=0.9, fold_top1=0.8)]
    columns = comparison_columns(both, HEADINGS)
    assert columns["folded, mean error"] == ["0.7500", "0.6250", "–"]
    assert columns["folded, top-1"] == ["–", "–", "0.8000"]


def test_csv_holds_every_number_exactly():
    rows = list(csv.DictReader(io.StringIO(comparison_csv(ROWS))))
    assert [entry["name"] for entry in rows] == ["run-8-0", "run-8-100", "run-10-100", "run-null-10"]
    assert float(rows[2]["reest/top1"]) == 0.1 + 0.2 and rows[0]["reest/top1"] == ""
    assert rows[3]["quant.weight_bits"] == "null" and "store.mode" not in rows[0]


def test_any_text_can_be_a_param():
    rows = [RunRow("a", "FINISHED", {"model.kwargs.MB": text}, {"fold/megabytes": 1.0}) for text in ("[/x]", "[bold]")]
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(comparison_table("[/title]", rows, HEADINGS))
    shown = console.export_text()
    assert "[/x]" in shown and "[bold]" in shown and "[/title]" in shown
    assert list(comparison_columns(rows, HEADINGS)) == [
        "model.kwargs.MB",
        "MB",
    ]  # a heading of the results is not replaced


def test_words_with_numbers_are_ordered_by_them():
    rows = [RunRow(n, "FINISHED", {"model.name": n}, {}) for n in ("resnet101", "resnet18", "vgg16", "18")]
    assert comparison_columns(rows, HEADINGS) == {"model": ["18", "resnet18", "resnet101", "vgg16"]}


def test_a_wide_table_keeps_every_number_in_120_columns():
    metrics = dict.fromkeys(["fp32/top1", "ptq/top1", "recal_only/top1", "qat/top1", "reest/top1", "fold/top1"], 0.1234)
    metrics.update({"reest/delta_top1": 0.5678, "fold/megabytes": 12.34})
    names = ("quant.weight_bits", "quant.act_bits", "qat.epochs", "reest.num_batches", "dataset._target_")
    values = (("2", "8", "0", "0", "bnre_exp.data.digits"), ("4", "null", "2", "100", "bnre_exp.data.fashion_mnist"))
    rows = [
        RunRow(str(n), status, dict(zip(names, v)), metrics)
        for n, (v, status) in enumerate(zip(values, ("FINISHED", "FAILED")))
    ]
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(comparison_table("title", rows, HEADINGS))
    shown = console.export_text()
    assert shown.count("0.1234") == 12 and shown.count("+0.5678") == 2 and shown.count("12.34") == 2
    assert "FINISHED" in shown and "quantized" in shown and "estimated" in shown  # only params may break
