"""The page of a sweep: whether re-estimation helped, what is best, where the runs are, and what failed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bnre_exp.jobs.stages.table import HEADINGS
from bnre_exp.report.comparison import RunRow
from bnre_exp.report.comparison_html import MOST_RUNS, comparison_page
from bnre_exp.report.plots import save_plots
from tests.report.pages import read

BAD = "<script>alert('x')</script>"


def row(bits: int, change: float | None = 0.1, verdict: str = "helped", folder: str = "", **more) -> RunRow:
    metrics = {"fp32/top1": 0.9, "ptq/top1": 0.5, "fold/top1": 0.5 + (change or 0), "fold/megabytes": float(bits)}
    if change is not None:
        tested = {"score_change": change, "score_low": change - 0.02, "score_high": change + 0.02, "p_value": 0.01}
        metrics |= {"reest/top1": 0.5 + change, **{f"reest/{name}": value for name, value in tested.items()}}
    params = {"quant.weight_bits": str(bits), "dataset.root": more.pop("root", "x")}
    return RunRow(more.pop("name", f"run{bits}"), "FINISHED", params, metrics, folder=folder, verdict=verdict, **more)


ROWS = [row(2, 0.3), row(3, 0.01, "no difference"), row(4, -0.1, "harmed"), row(8, None, "")]
FAILED = RunRow("broken", "FAILED", {"quant.weight_bits": "16"}, {}, error=f"UserError: {BAD}", overrides="a=1")


def test_the_page_says_in_how_many_runs_re_estimation_helped(tmp_path):
    text = comparison_page("sweep", ROWS, HEADINGS, tmp_path, [])
    page = read(text)
    assert page.headings[0] == (
        "Re-estimation helped in 1 of 3 runs, made no difference that the test images can show in 1 of 3 runs, "
        "harmed in 1 of 3 runs"
    )
    assert "4 of 4 runs finished" in page.text
    changes = re.search(r"<desc id=\"d-what-re-estimation-changed\">([^<]*)", text)[1]
    assert changes == (
        "weight_bits=2: +0.3000 (0.2800 to 0.3200); weight_bits=3: +0.0100 (-0.0100 to 0.0300); "
        "weight_bits=4: -0.1000 (-0.1200 to -0.0800)"
    )
    assert "<b>0.8000</b>" in text and "<b>0.4000</b>" not in text
    without = read(comparison_page("sweep", [row(2, None, ""), row(3, None, "")], HEADINGS, tmp_path, []))
    assert without.headings[0] == "sweep: top-1" and "svg" not in without.tags


def test_runs_over_seeds_are_counted_and_linked_one_by_one_and_joined_in_a_table(tmp_path):
    rows = []
    for bits, seed, change, verdict in ((2, 0, 0.3, "helped"), (2, 1, 0.2, "helped"), (4, 0, 0.1, "helped"),
                                        (4, 1, 0.01, "no difference")):  # fmt: skip
        (tmp_path / f"{len(rows)}").mkdir()
        (tmp_path / f"{len(rows)}" / "report.html").touch()
        one = row(bits, change, verdict, folder=str(tmp_path / f"{len(rows)}"))
        rows.append(replace(one, params={"seed": str(seed), **one.params}))
    text = comparison_page("sweep", rows, HEADINGS, tmp_path, [])
    page = read(text)
    assert page.headings == [
        "Re-estimation helped in 3 of 4 runs, made no difference that the test images can show in 1 of 4 runs",
        "Over seeds", "Run by run",
    ]  # fmt: skip
    assert "4 of 4 runs finished" in page.text and page.links == [f"{n}/report.html" for n in range(4)]
    assert text.count("<circle") == 4 and "0.7500 ±&nbsp;0.0707" in text and "1 helped, 1 no difference" in page.text


def test_runs_are_linked_where_they_left_a_page(tmp_path):
    (tmp_path / "0 #?").mkdir()
    (tmp_path / "0 #?" / "report.html").touch()
    rows = [row(4, folder=str(tmp_path / "1")), row(2, folder=str(tmp_path / "0 #?"))]
    page = read(comparison_page("sweep", rows, HEADINGS, tmp_path, []))
    assert page.links == ["0%20%23%3F/report.html"] and "report" in page.text
    lines = [line.split() for line in page.text.splitlines() if "helped" in line and line[:1].isdigit()]
    assert [line[-1][-2:] for line in lines] == ["#?", "d1"]  # ordered by bits; the second has a name and no link


def test_plots_are_within_the_page_in_its_own_colours(tmp_path):
    plots = save_plots(ROWS, tmp_path, HEADINGS)
    pictures = [path for path in plots if path.suffix == ".svg"]
    text = comparison_page("sweep", ROWS, HEADINGS, tmp_path, pictures)
    page = read(text)
    assert page.tags.count("svg") == 1 + len(pictures) and len(pictures) == 2
    assert "Top-1 before and after BN re-estimation, by weight bits</title>" in text
    inner = text[text.index("<body") :]
    assert "var(--c1)" in inner and not re.search(r"#[0-9a-f]{6}\b", inner) and "metadata" not in inner
    known = set(page.ids)
    assert {name for name in re.findall(r"(?:url\(#|href=\"#)([^\")]+)", inner)} <= known
    for path in pictures:
        assert "<title>Top-1 " in path.read_text()


def test_what_failed_is_told_and_names_are_no_markup(tmp_path):
    rows = [row(2, root=BAD), row(3, name=BAD, error=f"late {BAD}"), FAILED]
    pictures = [path for path in save_plots(rows, tmp_path, HEADINGS) if path.suffix == ".svg"]
    page = read(comparison_page(BAD, rows, HEADINGS, tmp_path, pictures))
    _, _, ended = page.text.partition("What did not finish")
    assert f"FAILED UserError: {BAD}" in ended and "broken a=1" in ended and f"late {BAD}" in ended
    alone = read(comparison_page("sweep", [FAILED], HEADINGS, tmp_path, []))
    assert alone.headings == ["sweep", "What did not finish"] and "0 of 1 runs finished" in alone.text
    with pytest.raises(ValueError, match="no runs"):
        comparison_page("sweep", [], HEADINGS, Path(), [])


def test_of_many_runs_the_first_are_drawn_and_all_are_listed(tmp_path):
    rows = [row(bits, 0.1) for bits in range(1, MOST_RUNS + 4)]
    text = comparison_page("sweep", rows, HEADINGS, tmp_path, [])
    assert text.count("<circle") == MOST_RUNS and f"the first {MOST_RUNS} of {len(rows)} runs" in text
    assert text.count("<tr>") == len(rows) + 1
