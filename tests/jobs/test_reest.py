"""What a job's re-estimation can be asked for: curves, a tolerance, samples, some layers, one layer at a time."""

from __future__ import annotations

import json

import pytest

from bnre_exp import UserError
from bnre_exp.jobs.stages.setting import Setting
from tests.jobs.test_run import job

PTQ = ("qat.epochs=0", "quant=w2a8", "export=checkpoint")


def steps_of(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["metrics"][name] for line in lines if name in line.get("metrics", {})}


def test_a_curve_in_one_pass_is_that_of_as_many_jobs(tmp_path):
    results, _ = job(tmp_path, *PTQ, "reest.num_batches=5", "reest.curve=[1,3,5,9]", name="curve")
    curve = steps_of(tmp_path / "curve", "reest/val_loss")
    assert list(curve) == [1, 3, 5]
    assert len(set(curve.values())) == 3
    plain, _ = job(tmp_path, *PTQ, "reest.num_batches=5", name="plain")
    for name in ("reest/top1", "reest/loss", "fold/loss"):
        assert plain.metrics[name] == results.metrics[name]
    short, _ = job(tmp_path, *PTQ, "reest.num_batches=3", "reest.curve=[3]", name="short")
    assert steps_of(tmp_path / "short", "reest/val_loss") == {3: curve[3]}


@pytest.mark.parametrize(
    "more", [("quant.act_bits=3",), ("quant.act_bits=3", "qat.epochs=1"), ("quant.act_bits=null",)]
)
def test_a_curve_is_of_networks_as_re_estimation_leaves_them(tmp_path, monkeypatch, caplog, more):
    evaluate, left = Setting.evaluate, []

    def watched(setting, network, description, **how):
        if description == "reest: evaluate":
            left.append(evaluate(setting, network, description, on_validation=True).metrics["loss"])
        return evaluate(setting, network, description, **how)

    monkeypatch.setattr(Setting, "evaluate", watched)
    job(tmp_path, *PTQ, *more, "export=off", "reest.num_batches=4", "reest.curve=[2,4]", name="curve")
    assert left == [steps_of(tmp_path / "curve", "reest/val_loss")[4]]
    assert "put back" not in caplog.text  # what is measured on the way changes nothing


def test_a_tolerance_stops_and_says_which_layer_was_last(tmp_path):
    results, _ = job(tmp_path, *PTQ, "reest.num_batches=50", "reest.tolerance=0.3")
    (row,) = [row for row in results.summary.stages if row.stage == "re-estimate BN"]
    count = results.metrics["reest/batches"]
    assert 4 <= count < 50 and results.metrics["reest/samples"] == 32 * count
    assert f"{count:.0f} batches" in row.note and "stopped: standard errors up to 0." in row.note
    assert f"from {count:.0f} batches in" in results.summary.verdict[0]
    never, _ = job(tmp_path, *PTQ, "reest.num_batches=5", "reest.tolerance=0.001", name="never")
    (row,) = [row for row in never.summary.stages if row.stage == "re-estimate BN"]
    assert "tolerance 0.001 not reached: standard errors up to" in row.note


def test_images_in_place_of_batches(tmp_path):
    results, _ = job(tmp_path, *PTQ, "reest.num_samples=40", name="forty")
    assert (results.metrics["reest/samples"], results.metrics["reest/batches"]) == (40, 2)
    (row,) = [row for row in results.summary.stages if row.stage == "re-estimate BN"]
    assert row.note.startswith("40 images")
    few, _ = job(tmp_path, *PTQ, "reest.num_samples=2", "reest.prior=1000000", name="few")
    assert few.metrics["reest/samples"] == 2 and few.metrics["reest/kl_mean"] < 1e-6


def test_layers_that_moved_and_what_each_brings_alone(tmp_path):
    results, _ = job(tmp_path, *PTQ, "reest.num_batches=4", "reest.ablate=true", tracking=True)
    drift = results.drift
    assert drift["BN"] == ["bn1", "bn2", "bn3", "bn4"] and drift["kind"] == ["convolution"] * 4
    assert len(drift["top-1 alone"]) == 4 and all(isinstance(value, float) for value in drift["top-1 alone"])
    assert results.metrics["reest/kl_mean"] == pytest.approx(sum(drift["KL [nats]"]) / 4)
    assert 0 < results.metrics["reest/self_consistency"] < 1
    page = (tmp_path / "run" / "drift.md").read_text()
    assert page.count("| convolution |") == 4 and "top-1 alone" in page
    again, _ = job(tmp_path, *PTQ, "reest.num_batches=4", "reest.ablate=true", name="again")
    assert again.drift == drift
    some, _ = job(tmp_path, *PTQ, "reest.num_batches=4", "reest.layers=[bn2,bn4]", name="some")
    assert some.drift["BN"] == ["bn2", "bn4"]


def test_augmented_images_and_further_passes_give_other_statistics(tmp_path):
    found = {
        how: job(tmp_path, *PTQ, "dataset.augment=true", "reest.num_batches=4", *how.split(), name=str(number))[0]
        for number, how in enumerate(("", "reest.augment=train", "reest.passes=3"))
    }
    losses = [results.metrics["reest/loss"] for results in found.values()]
    assert len(set(losses)) == 3
    consistency = [results.metrics["reest/self_consistency"] for results in found.values()]
    assert consistency[2] < consistency[0]


def test_small_batches_are_warned_of(tmp_path):
    notes = {}
    for size, method in ((16, "batch_average"), (16, "pooled"), (32, "batch_average")):
        overrides = (f"dataset.batch_size={size}", f"reest.method={method}", "reest.num_batches=3")
        results, _ = job(tmp_path, *PTQ, *overrides, name=f"{size}{method}")
        notes[size, method] = dict(results.summary.exceptions["note"]).get("re-estimation", "")
    assert "batch_average of batches of 16 leaves out the spread between them" in notes[16, "batch_average"]
    assert notes[16, "pooled"] == notes[32, "batch_average"] == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("reest.curve=[1]", "dataset.val_fraction=0"), "reest.curve is measured on the validation data"),
        (("reest.ablate=true", "dataset.val_fraction=0"), "reest.ablate is measured on the validation data"),
        (("reest.layers=[conv*]",), r"reest.layers=conv\*: no batch norm of the model has such a name; it has bn1"),
        (("reest.tolerance=0.1", "reest.method=ema"), "reest.tolerance: method=ema forgets old batches"),
    ],
)
def test_mistakes_are_told_before_training(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        job(tmp_path, *PTQ, *overrides)
    assert not list((tmp_path / "store" / "entries").glob("fp32*"))


def test_statistics_that_qat_was_fitted_to_are_not_replaced_without_a_word(tmp_path):
    frozen, _ = job(tmp_path, "qat.bn=frozen", "export=off", name="frozen")
    assert "QAT with frozen batch norms" in dict(frozen.summary.exceptions["note"])["re-estimation"]
    for number, more in enumerate(("qat.bn=train", "qat.bn=frozen reest.num_batches=0", "qat.bn=frozen qat.epochs=0")):
        plain, _ = job(tmp_path, *more.split(), "export=off", name=f"plain{number}")
        assert "frozen" not in dict(plain.summary.exceptions["note"]).get("re-estimation", "")


def test_a_job_without_files_ends_with_the_folded_network(tmp_path):
    results, _ = job(tmp_path, *PTQ[:2], "export=off", tracking=True, name="none")
    assert results.metrics["fold/folded_bns"] == 4 and results.folded is None
    assert ("export", "off (export.formats=[])") in results.summary.exceptions["note"]
    assert not {"folded", "model.onnx"} & {path.name for path in (tmp_path / "none").iterdir()}
