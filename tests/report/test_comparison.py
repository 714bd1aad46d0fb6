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


def test_the_title_names_the_metric_of_the_runs_that_have_one():
    miou = RunRow("a", "FINISHED", {"seed": "1"}, {"fold/miou": 0.5}, Headline("miou", "mIoU"))
    failed = RunRow("b", "FAILED", {"seed": "2"}, {})
    assert comparison_markdown("sweep", [miou, failed], HEADINGS).startswith("# sweep: mIoU\n")
    assert comparison_markdown("sweep", [failed], HEADINGS).startswith("# sweep\n")


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
    assert (
        text.startswith("# a | b: top-1\n") and "**0.8951**" in text and "**0.8950**" in text and text.count("**") == 6
    )
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


METRICS = {
    "fp32/top1": 0.98, "ptq/top1": 0.91, "qat/top1": 0.95, "reest/top1": 0.96, "reest/delta_top1": 0.01,
    "fold/top1": 0.97, "fold/megabytes": 5.6,
}  # fmt: skip
MANY = {
    "seed": "0", "model.name": "resnet18", "model._target_": "bnre_exp.models.torchvision_model",
    "dataset._target_": "bnre_exp.data.digits", "dataset.batch_size": "128", "dataset.train_limit": "null",
    "train.epochs": "null", "quant.weight_bits": "4", "quant.act_bits": "8", "qat.epochs": "2", "qat.lr": "0.01",
    "reest.num_batches": "100", "export.formats": "['checkpoint', 'onnx']",
}  # fmt: skip


def shown(rows: list[RunRow], width: int) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(comparison_table("title", rows, HEADINGS, width))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_runs_without_results_are_listed_with_their_errors_and_add_no_columns(width: int) -> None:
    good = [RunRow(bits, "FINISHED", {**MANY, "quant.weight_bits": bits}, METRICS) for bits in ("3", "4")]
    params = {name: f"other-{name}" for name in MANY}
    failed = RunRow("badly", "FAILED", params, {}, error="Error: there is [no] data.", overrides="seed=7 [x]")
    text = shown([*good, failed], width)
    assert text.startswith(shown(good, width))
    lines = [line.strip() for line in text.splitlines()[-3:]]
    assert lines == ["1 did not finish:", "FAILED  badly  seed=7 [x]", "Error: there is [no] data."]
    page = comparison_markdown("t", [*good, failed], HEADINGS)
    assert "- FAILED badly `seed=7 [x]`: Error: there is [no] data." in page and "other-" not in page
    only = shown([failed], width)
    assert "Error: there is [no] data." in only and "FP32" not in only


@pytest.mark.parametrize("width", [80, 120])
def test_no_word_breaks_where_many_settings_differ(width: int) -> None:
    rows = [
        RunRow(str(n), "FINISHED", {name: value if n else f"other-{value}" for name, value in MANY.items()}, METRICS)
        for n in range(2)
    ]
    text = shown(rows, width)
    for part in ("num_batches=100", "weight_bits=other-4", "torchvision_model", "train_limit=null", "quantized"):
        assert part in text, text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert text.count("0.9500") == 2 and " 1: " in text and " 2: " in text


def test_no_heading_breaks_within_a_word_at_80_columns() -> None:
    text = shown([RunRow(bits, "FINISHED", {"quant.weight_bits": bits}, METRICS) for bits in ("3", "4")], 80)
    words = text.split()
    assert {"weight_", "bits", "quantized", "re-", "estimated", "folded"} <= set(words)
