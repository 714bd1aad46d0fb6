"""The page that a job leaves: with all stages, with those before one that fails, and whatever goes wrong with it."""

from __future__ import annotations

import logging

import pytest

from bnre_exp import UserError
from bnre_exp.jobs import reporting
from bnre_exp.jobs.stages import fold, reest
from tests.jobs.test_run import job, mlflow_runs
from tests.report.pages import read

BAD = "<script>alert('x')</script>"
pytestmark = pytest.mark.usefixtures("verified_here")


def test_a_run_leaves_a_page_that_mlflow_has_too(tmp_path):
    exception = "quant.overrides=[{pattern: fc, off: true}]"
    results, console = job(tmp_path, f'tracking.run_name="{BAD}"', exception, tracking=True)
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    page = read(text)
    assert page.headings[0].startswith("Re-estimation alone, without training, ") and BAD in page.text
    for row in results.summary.stages:
        assert f"{row.stage}: {row.value:.4f}" in text
    low, high = results.metrics["reest/score_low"], results.metrics["reest/score_high"]
    start = results.metrics["qat/top1"]
    assert f"({start + low:.4f} to {start + high:.4f})" in text
    pictures = text.partition("Drift of the BN statistics")[0]
    assert pictures.count('class="interval"') == 2 and f"All {len(results.drift['BN'])} layers" in text
    assert "Oscillating weights" in page.text and "Layer by layer" in page.text
    history = results.metrics["fp32/train_loss"], results.metrics["qat/val_top1"]
    assert f"to {history[0]:.4g} at 2" in text and f"to {history[1]:.4g} at 1" in text
    assert {"folded", "layers.md", "fp32.safetensors"} <= set(page.links)
    changed = page.text.partition("What differs from a plain command")[2].partition("All ")[0]
    lines = changed.replace("\n", "")
    assert "reest.num_batches4100" in lines and "quant.act_bits" not in changed
    assert "quant.overrides[0].patternfc–" in lines  # as it is typed
    assert "quant.weight_bits" not in changed  # 2, as in a plain command, though the class has 8
    client, (record,) = mlflow_runs(tmp_path)
    assert "report.html" in {file.path for file in client.list_artifacts(record.info.run_id)}
    assert str(tmp_path / "run" / "report.html") in console.export_text()


def test_a_stage_that_raises_leaves_what_there_is_and_the_error(tmp_path, monkeypatch):
    def broken(*arguments, **more):
        raise UserError(f"no: {BAD} http://user:s3cret@host/x")

    monkeypatch.setattr(fold, "fold_batch_norms", broken)
    with pytest.raises(UserError, match="no: "):
        job(tmp_path, "tracking.uri=http://user:s3cret@host")
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    page = read(text)
    assert f"FAILED UserError: no: {BAD} http://***@host/x" in page.text and "s3cret" not in text
    assert "re-estimate BN: 0." in text and "Training loss" in text and "fold: 0." not in text
    assert page.headings[0].startswith("Re-estimation alone, ")
    assert "report.html" in (tmp_path / "run" / "report.md").read_text()


def test_an_interrupted_run_is_killed_and_shows_the_epochs_that_it_had(tmp_path, monkeypatch):
    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(reest, "reestimate_bn_stats", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, "qat.epochs=0")
    page = read((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "KILLED the run was interrupted" in page.text and page.tags.count("svg") == 3


def test_a_page_that_cannot_be_made_neither_costs_a_run_nor_hides_its_error(tmp_path, monkeypatch, caplog):
    def unwritable(path, page):
        raise OSError("disk is full")

    monkeypatch.setattr(reporting, "write_page", unwritable)
    with caplog.at_level(logging.WARNING):
        results, _ = job(tmp_path, "qat.epochs=0")
    assert "report.html cannot be written: disk is full" in caplog.text and "report" not in results.summary.places
    with pytest.raises(UserError, match="fp32.min_headline"):
        job(tmp_path, "fp32.min_headline=1.0", name="worse")
    assert (tmp_path / "worse" / "report.md").exists() and not (tmp_path / "worse" / "report.html").exists()
