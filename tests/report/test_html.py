"""The page of a run: what it shows, that it stands alone, and that names are no markup."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bnre_exp.algorithms.drift import BnDrift, drift_columns
from bnre_exp.report.html import MOST_LAYERS, MOST_LINES, RunPage, run_page
from bnre_exp.report.page import write_page
from bnre_exp.report.summary import StageResult, Summary
from bnre_exp.tasks import Headline
from tests.report.pages import read

BAD = "<script>alert('x')</script>"
SUMMARY = Summary(
    "resnet18-digits", "top-1",
    ["Re-estimation helped: top-1 0.3000 → 0.7000 (+0.4000). Ship the re-estimated network."],
    [StageResult("FP32", 0.9, None, 0.3, 3.0, "trained", "fp32"),
     StageResult("quantize", 0.3, -0.6, 1.5, 1.0, "", "ptq"),
     StageResult("recalibrate only", 0.31, 0.01, 1.4, 0.5, "for comparison", "recal_only"),
     StageResult("re-estimate BN", 0.7, 0.4, 0.5, 0.5, "10 batches", "reest")],
    {"note": [], "not quantized": [("fc", "switched off"), ("act", "switched off")]},
    {"ONNX model": "/out/run/model.onnx", "run folder": "/out/run", "MLflow": "bnre-exp ui /out/run",
     "  charts": "http://127.0.0.1:5000/#/x", "other": "/elsewhere/file"},
)  # fmt: skip
RUN = RunPage(
    SUMMARY, Path("/out/run"), Headline("top1", "top-1"),
    {"export/megabytes": 2.0, "export/size_vs_fp32": 0.25, "fold/megabytes": 1.5, "onnx/megabytes": 3.0,
     "onnx/milliseconds": 0.5, "onnx/fp32_milliseconds": 1.0},
    curves={"fp32/train_loss": {1: 2.0, 2: 1.0}, "qat/train_loss": {1: 0.5, 2: 0.4}, "fp32/val_top1": {1: 0.5, 2: 0.6}},
    intervals={"reest": (0.65, 0.75)},
    settings={"quant.weight_bits": "2", "reest.num_batches": "10", "tracking.uri": "x"},
    defaults={"quant.weight_bits": "8", "reest.num_batches": "10", "tracking.uri": "null"},
    overrides="quant.weight_bits=2",
)  # fmt: skip
DRIFT = drift_columns([
    BnDrift("a", "conv", 8, 0.5, 2.0, 0.1, (-0.25, 0.1, 0.4), (1.0, 2.0, 4.0)),
    BnDrift("b", "depthwise", 4, 2.0, 0.25, 1.25, (-3.0, -1.0, 1.0), (0.125, 0.25, 0.5)),
])  # fmt: skip


def test_a_run_has_its_verdict_first_and_then_its_pictures():
    text = run_page(RUN)
    page = read(text)
    assert page.headings[0] == SUMMARY.verdict[0].replace(": ", "", 1)
    assert page.headings[1:] == [
        "Stage by stage", "What is left out, and notes", "not quantized", "Settings", "Files and commands",
    ]  # fmt: skip
    captions = re.findall(r"<figcaption>([^<]*)", text)
    assert captions == ["Top-1 stage by stage", "Training loss", "Top-1 on validation data", "Size",
                        "Time of an image in ONNX Runtime"]  # fmt: skip
    assert text.index("<h1>") < text.index("<svg") < text.index("<h2>")
    stages = re.search(r"<desc[^>]*>(FP32: [^<]*)<", text)[1]
    assert stages == (
        "FP32: 0.9000; quantize: 0.3000; recalibrate only: 0.3100; re-estimate BN: 0.7000 (0.6500 to 0.7500)"
    )
    assert "FP32: 8.00 MB; folded, codes at their bits: 1.50 MB; checkpoint: 2.00 MB; ONNX model: 3.00 MB" in text
    assert "FP32: 1.00 ms; quantized: 0.50 ms" in text


def test_what_was_not_measured_has_no_picture():
    bare = replace(RUN, summary=Summary("bare", "mIoU"), metrics={}, curves={}, headline=Headline("miou", "mIoU"))
    text = run_page(replace(bare, error=("FAILED", "UserError: no")))
    page = read(text)
    assert "svg" not in page.tags and "figure" not in page.tags and page.headings[0] == "bare"
    assert "FAILED UserError: no" in page.text
    row = StageResult("FP32", math.nan, None, None, 1.0, "", "fp32")
    page = read(run_page(replace(bare, summary=Summary("bare", "mIoU", stages=[row]))))
    assert "svg" not in page.tags and "nan" in page.text


def test_settings_that_differ_come_first_and_places_below_the_run_are_links():
    page = read(run_page(RUN))
    before, _, after = page.text.partition("All 3 settings")
    assert "quant.weight_bits2" in before.replace("\n", "") and "reest.num_batches" not in before
    assert "tracking.uri" not in before and "tracking.uri" in after and "As typed: quant.weight_bits=2" in before
    assert page.links == ["model.onnx", "http://127.0.0.1:5000/#/x"]


def test_settings_beside_those_of_a_plain_command():
    more = {"quant.overrides[0].act_bits": "4", "fp32.min_headline": "1.0"}
    page = read(run_page(replace(RUN, settings={**RUN.settings, **more})))
    changed = page.text.replace("\n", "").partition("What differs")[2].partition("All 5 settings")[0]
    assert "quant.overrides[0].act_bits4–" in changed and "fp32.min_headline1.0" in changed
    alike = read(run_page(replace(RUN, defaults={**RUN.settings, "tracking.uri": "y"})))
    assert "Nothing differs from a plain command" in alike.text and "What differs" not in alike.text
    unknown = read(run_page(replace(RUN, defaults={})))
    assert "plain command" not in unknown.text and "All 3 settings" in unknown.text


def test_long_lists_are_folded_away_by_reason_and_lose_nothing():
    many = [(f"layer{n}", f"reason {n}") for n in range(MOST_LINES + 1)]
    alike = [(f"conv{n}", "of the same kind") for n in range(MOST_LINES + 1)]
    summary = replace(SUMMARY, exceptions={"many": many, "alike": alike, "few": [("a", "b")], "none": []})
    text = run_page(replace(RUN, summary=summary, settings={}))
    page = read(text)
    assert page.tags.count("details") == 2 and f"many ({len(many)})" in page.text
    assert f"{len(alike)} × of the same kind" in page.text and "Nothing under: none." in page.text
    assert {name for name, _ in (*many, *alike)} <= set(re.findall(r"<code>(\w+)</code>", text))
    assert page.headings[3:5] == ["alike", "few"]


def test_drift_and_batches_are_drawn_when_they_are_given():
    text = run_page(replace(RUN, drift=DRIFT, by_batches={0: 0.1, 1: 0.2, 10: 0.7}))
    page = read(text)
    assert "Drift of the BN statistics" in page.headings and "All 2 layers" in page.text and "1.25" in page.text
    assert "a: 0.5 (-0.2500 to 0.4000); b: 2 (-3.0000 to 1.0000)" in text
    assert "a: × 2 (0.0000 to 2.0000); b: × 0.25 (-3.0000 to -1.0000)" in text  # in doublings
    legend = ["conv", "depthwise"]
    assert [found for found in re.findall(r'text-anchor="start">(\w+)<', text) if found in legend] == legend * 2
    assert "re-estimated: from 0.2 at 1 to 0.7 at 10" in text
    assert "one BN alone" not in text
    assert "Drift of the BN statistics" not in read(run_page(replace(RUN, drift=drift_columns([])))).headings


def test_what_each_bn_brings_alone_and_other_tables_are_there():
    tables = {"layer by layer": {"layer": [BAD, "fc"], "weights": [3, 40]}}
    text = run_page(replace(RUN, drift={**DRIFT, "top-1 alone": [0.25, -0.125]}, tables=tables))
    page = read(text)
    assert "Top-1 by re-estimating one BN alone" in text and "a: +0.2500; b: -0.1250" in text
    assert (
        "top-1 alone" in page.text and "Layer by layer" in page.text and BAD in page.text and "Layers" in page.headings
    )


def test_of_many_layers_those_that_moved_most_are_drawn_in_order():
    count = MOST_LAYERS + 5
    moved = [float((n + 3) % 9) for n in range(count)]
    same, last = (1.0, 1.0, 1.0), (0.0, 0.0, 1.0)
    drift = drift_columns([
        BnDrift(f"bn{n}", "conv", 8, 0.1, 1.0, moved[n], (0.0, 0.0, 0.0), same if n < count - 1 else last)
        for n in range(count)
    ])  # fmt: skip
    text = run_page(replace(RUN, drift=drift))
    shown = re.findall(r"(bn\d+): ", re.search(r"<desc id=\"d-shift-of-the-mean\">([^<]*)", text)[1])
    left = {f"bn{n}" for n in range(count)} - set(shown)
    assert len(shown) == MOST_LAYERS and shown == sorted(shown, key=lambda name: int(name[2:]))
    assert {moved[int(name[2:])] for name in left} == {0.0} and f"All {count} layers" in text
    assert f"the {MOST_LAYERS} of {count} layers that moved most" in text


def test_where_the_metric_is_no_mean_of_scores_their_change_has_a_picture_of_its_own():
    tested = {"reest/score_change": 0.2, "reest/score_low": 0.1, "reest/score_high": 0.3}
    assert "Change of an image" not in run_page(replace(RUN, metrics=tested))
    text = run_page(replace(RUN, metrics=tested, intervals={}))
    read(text)
    assert "re-estimate BN: +0.2000 (0.1000 to 0.3000)" in text and "re-estimate BN: 0.7000<" in text


@pytest.mark.parametrize("better", [True, False])
def test_which_direction_is_better_is_said(better):
    text = run_page(replace(RUN, headline=Headline("mse", "MSE", better)))
    assert ("the higher the better" in text) == better and ("the lower the better" in text) != better


def test_what_users_name_is_no_markup():
    many = [(f"{n}", f"{BAD}{n % 2}") for n in range(30)]  # more than a list shows unfolded
    summary = Summary(
        BAD, BAD, [f"{BAD}: {BAD}"], [StageResult(BAD, 0.5, None, None, 1.0, BAD, "fp32")],
        {BAD: [(BAD, BAD), *many], f"{BAD}2": []}, {BAD: BAD, "path": f"/out/run/{BAD}", "web": f"http://x/\"onclick='{BAD}"},
    )  # fmt: skip
    run = replace(
        RUN, summary=summary, headline=Headline("top1", BAD), settings={BAD: BAD}, defaults={BAD: "1"}, overrides=BAD,
        error=("FAILED", f"UserError: {BAD}"), drift={**DRIFT, "BN": [BAD, "b"], "kind": [BAD, "c"]},
        tables={BAD: {BAD: [BAD]}},
        by_batches={1: 0.1, 2: 0.2},
    )  # fmt: skip
    page = read(run_page(run))
    assert page.text.count(BAD) > 20 and page.headings[0] == BAD + BAD
    assert all(link.startswith(("%3Cscript", "http://x/", "script")) for link in page.links), page.links


def test_a_page_is_utf_8_whatever_a_name_holds(tmp_path):
    write_page(tmp_path / "page.html", run_page(replace(RUN, overrides="ünï\udcff")))
    assert "ünï?" in (tmp_path / "page.html").read_text(encoding="utf-8")
