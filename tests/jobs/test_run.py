"""Whole jobs, as the command line runs them, on the embedded digits."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console

from bnre_exp import UserError, evaluate, integer_simulation, load_folded
from bnre_exp.algorithms.compare import Difference
from bnre_exp.cli.compose import compose_config, plain_config
from bnre_exp.jobs.reporting import Results
from bnre_exp.jobs.run import run

ROOT = Path(__file__).parents[2]
# A job that leaves out nothing, with the network of the default configuration, and with one that takes a moment.
SMALL = [
    "dataset.train_limit=192", "dataset.test_limit=64", "dataset.batch_size=32", "train.epochs=2", "qat.epochs=1",
    "reest.num_batches=4", "quant.calib_batches=2", "export=checkpoint",
]  # fmt: skip
TINY = [*SMALL, "model=custom", "model._target_=tests.jobs.nets.Residual"]
pytestmark = pytest.mark.usefixtures("verified_here")


def job(tmp_path: Path, *overrides: str, name: str = "run", tracking: bool = False, base: list[str] = TINY):
    """Run one small job in this process; returns its results and what it printed."""
    more = [f"runtime.output_dir={tmp_path}", f"tracking.enabled={tracking}".lower()]
    config = compose_config([*base, *more, *overrides])
    console = Console(record=True, width=160, file=io.StringIO())
    done = run(config, run_dir=tmp_path / name, overrides=overrides, console=console, default=plain_config())
    return done, console


def environment(tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # the networks of the tests are there
    return {**os.environ, "BNRE_OUTPUT_DIR": str(tmp_path / "out"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def command(tmp_path: Path, *overrides: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bnre_exp", *overrides],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=300, check=False, **more,
    )  # fmt: skip


def mlflow_runs(output_dir: Path):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("bnre_exp")
    return client, client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


class Whole(NamedTuple):
    """A job that leaves every format, verified in another process, and is tracked."""

    base: list[str]
    folder: Path
    results: Results
    said: str
    model: tuple[str, str]
    first_layer: str
    layers: int


RESIDUAL = ("model._target_", "tests.jobs.nets.Residual"), "4 bits, 32 channels", 5
RESNET18 = ("model.name", "resnet18"), "4 bits, 64 channels", 21


@pytest.fixture(
    scope="module",
    params=[pytest.param((TINY, *RESIDUAL), id="residual"),
            pytest.param((SMALL, *RESNET18), id="resnet18", marks=pytest.mark.slow)],
)  # fmt: skip
def whole(request, tmp_path_factory) -> Whole:
    base, *expected = request.param
    folder = tmp_path_factory.mktemp("whole")
    results, console = job(folder, "export=all", "quant=w4a8", tracking=True, base=base)
    gc.freeze()  # the libraries that were imported for that
    return Whole(base, folder, results, console.export_text(), *expected)


def test_all_stages_with_qat_leave_what_the_readme_promises(whole):
    folder = whole.folder
    client, (record,) = mlflow_runs(folder)
    assert record.info.status == "FINISHED"
    stages = ["fp32", "ptq", "recal_only", "reest_only", "qat_start", "qat", "reest", "fold", "export"]
    assert [f"{stage}/top1" in record.data.metrics for stage in stages] == [True] * 9
    found = record.data.metrics
    for stage, start in (("reest_only", "recal_only"), ("qat_start", "ptq"), ("qat", "qat_start"), ("reest", "qat")):
        assert found[f"{stage}/delta_top1"] == pytest.approx(found[f"{stage}/top1"] - found[f"{start}/top1"])
    expected = {"reest/delta_top1", "reest/seconds", "fold/max_abs_logit_diff", "fold/top1_agreement",
                "fold/bias_delta_top1", "qat/val_top1", "fp32/train_loss", "export/megabytes"}  # fmt: skip
    assert expected <= set(record.data.metrics)
    assert record.data.metrics["fold/max_rel_logit_diff"] < 1e-5
    assert record.data.metrics["fold/top1_agreement"] > 0.98
    assert len(client.get_metric_history(record.info.run_id, "fp32/val_top1")) == 2
    name, value = whole.model
    assert record.data.params["reest.num_batches"] == "4" and record.data.params[name] == value
    assert {i.tags[0].value for i in record.inputs.dataset_inputs} == {
        "train, calibration, reestimation",
        "validation",
        "test",
    }
    tags = record.data.tags
    assert tags["verdict.reest"] in ("helped", "harmed", "no difference") and "reest/p_value" in record.data.metrics
    assert tags["verdict"].startswith("Re-estimation alone, without training, ") and "After QAT, " in tags["verdict"]
    assert "qat_beside_reest_only/score_low" in record.data.metrics
    local = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {name for line in local for name in line.get("metrics", {})}
    assert logged == set(record.data.metrics)
    folded = load_folded(whole.results.folded)
    assert not any("BatchNorm" in type(m).__name__ for m in folded.modules())
    for words in ("FP32", "quantize + calibrate", "QAT", "re-estimate BN", "fold", "checkpoint", " ui ", "folded"):
        assert words in whole.said
    assert (folder / "run" / "report.md").read_text().count("| ") > 6
    assert {"layers.md", "layers.json", "report.md"} <= {f.path for f in client.list_artifacts(record.info.run_id)}
    assert "layers.json" in record.data.tags["mlflow.loggedArtifacts"]  # what MLflow shows as a table
    layers = (folder / "run" / "layers.md").read_text()
    assert f"| conv1 | Conv2d | {whole.first_layer} | bn1 folded into conv1 | relu | 8 bits, unsigned |" in layers


def test_every_format_is_verified_listed_and_found_again(whole):
    import mlflow

    folder, metrics = whole.folder, whole.results.metrics
    for name in ("export", "onnx", "encodings"):
        assert abs(metrics[f"{name}/top1"] - metrics["fold/top1"]) <= 1 / 64 + 1e-9
    assert metrics["onnx/top1_agreement"] > 0.95 and metrics["onnx/milliseconds"] > 0
    assert metrics["onnx/integer_layers"] == whole.layers and metrics["onnx/float_layers"] == 0
    assert 0.1 < metrics["export/size_vs_fp32"] < 0.15  # 4-bit codes
    assert {path.name for path in (folder / "run" / "encodings").iterdir()} == {
        "model.onnx", "encodings_1.0.0.json", "encodings_2.0.0.json",
    }  # fmt: skip
    assert "ONNX Runtime" in whole.said
    client, (record,) = mlflow_runs(folder)
    listed = client.search_logged_models([record.info.experiment_id])
    models = {model.model_type: model for model in listed}
    assert models.keys() == {"bnre_exp folded checkpoint", "onnx"} and len(listed) == 2
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    loaded = mlflow.pyfunc.load_model(f"models:/{models['onnx'].model_id}")
    assert loaded.predict(torch.zeros(3, 3, 32, 32).numpy())["output"].shape == (3, 10)
    assert loaded.metadata.signature is not None and loaded.metadata.saved_input_example_info is not None


def test_the_same_job_again_finds_every_format(whole):
    again, console = job(whole.folder, "export=all", "quant=w4a8", name="again", base=whole.base)
    text = console.export_text()
    assert "ONNX Runtime: top-1" in text and "reused" in text
    first = (whole.folder / "run" / "model.onnx").read_bytes()
    assert (whole.folder / "again" / "model.onnx").read_bytes() == first
    assert again.metrics["onnx/top1"] == whole.results.metrics["onnx/top1"]


def test_ptq_recalibrates_and_keeps_the_two_effects_apart(tmp_path):
    results, _ = job(tmp_path, "qat.epochs=0", "quant=w3a8")
    metrics = results.metrics
    assert metrics["reest/delta_top1"] == pytest.approx(metrics["reest/top1"] - metrics["recal_only/top1"])
    assert "qat/top1" not in metrics
    assert [row.stage for row in results.summary.stages][2] == "recalibrate only"


def test_stages_that_are_off_have_no_metrics_and_say_so(tmp_path):
    results, _ = job(tmp_path, "qat.epochs=0", "reest.num_batches=0")
    assert not [name for name in results.metrics if name.startswith(("qat/", "reest/", "recal_only/"))]
    notes = dict(results.summary.exceptions["note"])
    assert notes["QAT"] == "off (qat.epochs=0)" and notes["re-estimation"] == "off (reest.num_batches=0)"


def test_what_is_done_before_qat_has_a_row_and_a_switch(tmp_path):
    """Without re-estimation there is none before QAT either, and QAT's gain is measured from where it starts."""
    starts = {}
    for how in ("prepare=auto", "prepare=calibrate", "prepare=none", "off"):
        overrides = ["reest.num_batches=0"] if how == "off" else [f"qat.{how}"]
        results, _ = job(tmp_path, "quant=w2a8", *overrides, name=how)
        metrics, notes = results.metrics, {row.stage: row.note for row in results.summary.stages}
        start = "ptq" if how == "prepare=none" else "qat_start"
        assert metrics["qat/delta_top1"] == pytest.approx(metrics["qat/top1"] - metrics[f"{start}/top1"])
        assert ("reest_only/top1" in metrics) == (how != "off") and ("qat_start/top1" in metrics) == (start != "ptq")
        starts[how] = notes.get("start of QAT", "").partition(";")[0], metrics["qat/loss"]
    assert starts["prepare=auto"][0] == "re-estimated from 2 batches, ranges calibrated"
    assert starts["off"] == starts["prepare=calibrate"] and starts["off"][0] == "ranges calibrated"
    assert starts["prepare=none"][0] == "" and starts["prepare=auto"][1] != starts["off"][1]


def test_re_estimation_alone_is_that_of_a_job_without_qat_and_leaves_qat_alone(tmp_path, monkeypatch):
    alone, _ = job(tmp_path, "qat.epochs=0", "quant=w2a8", name="alone")
    beside, _ = job(tmp_path, "quant=w2a8", name="beside")
    for name in ("recal_only/top1", "recal_only/loss"):
        assert beside.metrics[name] == alone.metrics[name]
    for name in ("top1", "loss", "delta_top1"):
        assert beside.metrics[f"reest_only/{name}"] == alone.metrics[f"reest/{name}"]

    def fails(*args, **kwargs):
        raise UserError("the statistics are not finite")

    monkeypatch.setattr("bnre_exp.jobs.stages.reest_only.re_estimated", fails)
    without, _ = job(tmp_path, "quant=w2a8", "store.mode=off", name="without")
    assert without.metrics["qat/loss"] == beside.metrics["qat/loss"] and "reest_only/top1" not in without.metrics
    assert without.summary.exceptions["note"] == [("re-estimation without QAT", "the statistics are not finite")]


CONTROL = [
    "qat.epochs=2", "qat.oscillation=freezing", "qat.oscillation_momentum=0.1", "qat.freeze_to=0.0", "qat.lr=0.05",
    "qat.ema_decay=0.9", "qat.bn_momentum=0.05", "qat.freeze_bn_epoch=2", "qat.validate=reestimated",
    "qat.validate_batches=2",
]  # fmt: skip


def curves(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["metrics"] for line in lines if "qat/train_loss" in line.get("metrics", {})]
    return [{name: value for name, value in epoch.items() if "seconds" not in name} for epoch in found]


def test_the_control_of_qat_is_in_curves_and_a_table_also_when_it_is_reused(tmp_path):
    results, _ = job(tmp_path, *CONTROL)
    epochs = curves(tmp_path / "run")
    assert [0 < epoch["qat/oscillating"] + epoch["qat/frozen"] < 1 for epoch in epochs] == [True, True]
    assert 0 < epochs[0]["qat/frozen"] < epochs[1]["qat/frozen"] == results.metrics["qat/frozen"]
    table = (tmp_path / "run" / "oscillating_weights.md").read_text()
    assert table.splitlines()[2] == "| layer | weights | oscillating | frozen |" and "| conv1 | 864 | " in table
    assert "of weights frozen" in (tmp_path / "run" / "report.md").read_text()
    again, console = job(tmp_path, *CONTROL, name="again")
    assert "QAT: top-1" in console.export_text() and "reused" in (tmp_path / "again" / "report.md").read_text()
    assert curves(tmp_path / "again") == epochs
    assert (tmp_path / "again" / "oscillating_weights.md").read_text() == table


def test_what_validation_sees_is_what_re_estimation_gives(tmp_path):
    """With as many batches as the stage of re-estimation takes, in the same order. What is trained is the same."""
    last, _ = job(tmp_path, *CONTROL, "qat.validate_batches=4", "fold.bias_bits=null", "dataset.augment=true")
    plain, _ = job(
        tmp_path, *CONTROL, "qat.validate=as_is", "fold.bias_bits=null", "dataset.augment=true", name="as is"
    )
    found, as_is = curves(tmp_path / "run"), curves(tmp_path / "as is")
    assert found[-1]["qat/val_loss"] != pytest.approx(as_is[-1]["qat/val_loss"], rel=1e-3)
    assert found[-1]["qat/val_top1"] == pytest.approx(last.metrics["fold/val_top1"], abs=0.06)
    assert [epoch["qat/train_loss"] for epoch in found] == [epoch["qat/train_loss"] for epoch in as_is]
    assert last.metrics["qat/loss"] == plain.metrics["qat/loss"]  # on the test data


def test_weights_that_layers_share_are_trained_and_freezing_them_is_refused_before_anything_is(tmp_path):
    results, _ = job(tmp_path, "model._target_=tests.jobs.nets.Tied")
    table = (tmp_path / "run" / "oscillating_weights.md").read_text()
    assert "qat/oscillating" in results.metrics and "| conv3 | 147456 | " in table and "| conv4 | 147456 | " in table
    how = ("model._target_=tests.jobs.nets.Tied", "qat.oscillation=freezing", "store.mode=off")
    with pytest.raises(UserError, match=r"qat\.oscillation=freezing: .*conv3, conv4 share a weight"):
        job(tmp_path, *how, name="frozen")
    assert "train_loss" not in (tmp_path / "frozen" / "metrics.jsonl").read_text()
    job(tmp_path, *how, "qat.epochs=0", name="not trained")


def test_weights_that_are_not_quantized_cannot_oscillate_which_is_told(tmp_path):
    results, _ = job(tmp_path, "quant.weight_bits=null", "qat.oscillation=freezing")
    assert ("qat.oscillation", "no weights are quantized, so none can oscillate") in results.summary.exceptions["note"]
    assert "qat/oscillating" not in results.metrics


def test_the_folded_checkpoint_gives_the_reported_accuracy(tmp_path):
    from bnre_exp.data import DataSpec, build_loaders, resolve_preprocessing

    results, _ = job(tmp_path, "quant=w4a4")
    preprocessing = resolve_preprocessing(
        None, image_size=None, mean=None, std=None, default_image_size=32, default_mean=[0.305], default_std=[0.324]
    )
    spec = DataSpec("bnre_exp.data.digits", batch_size=32, train_limit=192, test_limit=64)
    loaders = build_loaders(spec, preprocessing=preprocessing)
    shipped = integer_simulation(load_folded(results.folded))
    assert evaluate(shipped, loaders.test).top1 == results.metrics["export/top1"]


def test_a_job_does_not_depend_on_what_ran_before_in_the_process(tmp_path):
    def metrics(name, *overrides):
        values = job(tmp_path, "store.mode=off", *overrides, name=name)[0].metrics
        return {key: value for key, value in values.items() if "seconds" not in key}

    alone = metrics("alone")
    torch.manual_seed(99)
    network = "model._target_=tests.networks.flat_cnn"
    other = metrics("other", "quant.weight_bits=2", "seed=3", "runtime.threads=1", network)
    assert other != alone and metrics("again") == alone
    assert metrics("seed", "seed=1") != alone


def test_a_trained_network_can_be_taken_up_again(whole, tmp_path):
    trained = whole.folder / "run" / "fp32.safetensors"
    again, _ = job(tmp_path, f"model.checkpoint={trained}", "train.epochs=null", base=whole.base)
    assert again.metrics["fp32/top1"] == whole.results.metrics["fp32/top1"]
    assert again.summary.stages[0].note == "loaded"


def test_min_top1_stops_before_quantization(tmp_path):
    with pytest.raises(UserError, match=r"fp32/top1=.* is worse than fp32.min_headline=1.0"):
        job(tmp_path, "fp32.min_top1=1.0", tracking=True)
    _, (record,) = mlflow_runs(tmp_path)
    assert record.info.status == "FAILED" and "fp32.min_headline" in record.data.tags["error"]
    assert "fp32/top1" in record.data.metrics and "ptq/top1" not in record.data.metrics
    assert (tmp_path / "run" / "fp32.safetensors").exists() and (tmp_path / "run" / "report.md").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.checkpoint=nowhere.safetensors"], "nowhere.safetensors"),
        (["dataset=image_folder", "dataset.root=/nowhere"], "/nowhere"),
        (["quant.overrides=[{pattern: 'layer9.*', off: true}]"], "layer9"),
        (["dataset.num_classes=5"], "num_classes"),
        (["model.leaf_modules=[nope]"], "nope"),
        (["model._target_=nowhere.Net"], "nowhere"),
        pytest.param(
            ["runtime.device=cuda"],
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_mistakes_are_told_before_any_training(tmp_path, overrides, message):
    started = time.monotonic()
    with pytest.raises(UserError, match=re.escape(message)):
        job(tmp_path, *overrides, "train.epochs=500")
    assert "fp32" not in (tmp_path / "run" / "metrics.jsonl").read_text().replace("fp32.", "")
    assert time.monotonic() - started < 60


def test_a_users_own_network_by_target(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width=4, num_classes=10):\n"
        "        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU())\n"
        "        self.head = nn.Linear(width, num_classes)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.body(x).mean((2, 3)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    results, _ = job(tmp_path, "model._target_=own_net.Net", "+model.kwargs.width=6")
    assert results.metrics["fold/folded_bns"] == 1
    with pytest.raises(UserError, match="10"):
        job(tmp_path, "model._target_=own_net.Net", "+model.kwargs.num_classes=7", name="wrong")


@pytest.mark.slow
def test_multirun_gives_one_comparable_run_each_and_goes_on_after_a_failure(tmp_path):
    done = command(
        tmp_path, "-m", *TINY, "quant.weight_bits=2,4", "reest.num_batches=0,4", "qat.prepare=reestimate",
        "fp32.min_top1=0,1.0",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("fp32.min_headline=1.0") >= 4
    _, runs = mlflow_runs(tmp_path / "out")
    runs = [record for record in runs if record.data.params]  # without the sweep's own
    assert len(runs) == 8 and sorted(r.info.status for r in runs) == ["FAILED"] * 4 + ["FINISHED"] * 4
    finished = [r for r in runs if r.info.status == "FINISHED"]
    assert len({r.data.metrics["fp32/top1"] for r in finished}) == 1  # seeded alike
    by_bits = {}
    for record in finished:
        by_bits.setdefault(record.data.params["quant.weight_bits"], set()).add(record.data.metrics["qat/top1"])
    assert {bits: len(values) for bits, values in by_bits.items()} == {"2": 1, "4": 1}
    single = command(tmp_path, *TINY, "quant.weight_bits=2", "reest.num_batches=4", "tracking.experiment=single")
    assert single.returncode == 0, single.stderr
    table = next(r for r in finished if r.data.params["quant.weight_bits"] == "2" and "reest/top1" in r.data.metrics)
    assert f"top-1 {table.data.metrics['reest/top1']:.4f}" in single.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_keeps_what_is_finished(tmp_path, number, status):
    process = subprocess.Popen(
        [sys.executable, "-m", "bnre_exp", *TINY, "qat.epochs=10000"],
        cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )  # fmt: skip
    for line in process.stdout:
        if "quantize + calibrate" in line:
            break
    time.sleep(1)
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status and "Traceback" not in errors
    assert "What was finished is in" in errors
    _, (record,) = mlflow_runs(tmp_path / "out")
    assert record.info.status == "KILLED" and record.data.tags["error"]
    assert {"fp32/top1", "ptq/top1"} <= set(record.data.metrics)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert (folder / "fp32.safetensors").exists() and "quantize" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_a_loss_that_diverges_and_a_full_disk_are_told_in_a_sentence(tmp_path):
    diverged = command(tmp_path, *TINY, "train.lr=1e30")
    assert diverged.returncode == 2 and "learning rate" in diverged.stderr and "Traceback" not in diverged.stderr
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(full)], check=False)
    if mounted.returncode:  # without the right to mount, a limit on file size stands in for the full disk
        done = command(tmp_path, *SMALL, preexec_fn=_limit_file_size)
    else:
        try:
            done = command(tmp_path, *SMALL, f"runtime.output_dir={full}")
        finally:
            subprocess.run(["umount", str(full)], check=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 4, done.stderr


def _limit_file_size() -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 2**20, 8 * 2**20))


@pytest.mark.slow
@pytest.mark.fashion_mnist
def test_pretrained_efficientnet_lite0_is_fine_tuned_quantized_and_folded(tmp_path, monkeypatch):
    """The example of a network of one's own in the documentation, its file included, on part of the data."""
    page = (ROOT / "docs" / "your_network.md").read_text()
    (source,) = re.findall(r"```python\n(# lite0.py\n.*?)```", page, re.DOTALL)
    (tmp_path / "lite0.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    results, _ = job(
        tmp_path, "model=custom", "model._target_=lite0.pretrained", "model.kwargs.num_classes=10",
        "model.kwargs.image_size=32", "dataset=fashion_mnist", "train.epochs=1", "quant=w4a8", "qat.epochs=0",
        "dataset.train_limit=12000", "dataset.test_limit=1000", "train.lr=0.02", "reest.num_batches=50", base=SMALL,
    )  # fmt: skip
    metrics = results.metrics
    assert metrics["fp32/top1"] > 0.6 and metrics["reest/top1"] > metrics["ptq/top1"] + 0.05, metrics
    assert metrics["fold/folded_bns"] == 49 and metrics["fold/kept_bns"] == 0
    assert metrics["fold/max_rel_logit_diff"] < 1e-5 and metrics["export/top1"] == metrics["fold/top1"]


@pytest.mark.slow
@pytest.mark.fashion_mnist
def test_mobilenet_v2_on_fashion_mnist_recovers_at_two_bits(tmp_path):
    """The table of the README in small: two epochs on part of the data, 2-bit weights, no QAT."""
    results, _ = job(
        tmp_path, "model=mobilenet_v2", "dataset=fashion_mnist", "qat.epochs=0", "quant=w2a8",
        "dataset.train_limit=12000",
        "dataset.test_limit=2000", "dataset.batch_size=64", "train.epochs=2", "reest.num_batches=50",
        "quant.calib_batches=8", base=SMALL,
    )  # fmt: skip
    metrics = results.metrics
    assert metrics["fp32/top1"] > 0.75 and metrics["ptq/top1"] < 0.3
    assert metrics["reest/delta_top1"] > 0.1
    assert metrics["fold/top1"] == pytest.approx(metrics["reest/top1"], abs=0.01)


def test_a_file_that_predicts_otherwise_fails_the_run(tmp_path, monkeypatch):
    import bnre_exp.jobs.stages.export as step

    def damaged(plain, path, int4):
        first = plain.parameters[-2]
        first.scale[:] = first.scale[::-1].copy()
        first.codes[:] = -first.codes
        real(plain, path, int4)

    real = step.write_qdq
    monkeypatch.setattr(step, "write_qdq", damaged)
    with pytest.raises(UserError, match=r"export: the ONNX model that was written.*export.min_agreement=0.98"):
        job(tmp_path, "export=default")
    monkeypatch.setattr(step, "write_qdq", lambda plain, path, int4: path.write_bytes(b"no model"))
    with pytest.raises(UserError, match=r"export: the ONNX model.*in another process.*is not an ONNX model"):
        job(tmp_path, "export=default", name="other")


def test_what_cannot_be_exported_stops_before_training(tmp_path):
    with pytest.raises(UserError, match=r"export: opset 13 has no integers of 9 to 16 bits.*use opset=21"):
        job(tmp_path, "export=default", "export.opset=13", "quant.act_bits=10")
    assert not (tmp_path / "run" / "fp32.safetensors").exists()


def test_a_network_that_qat_ruined_is_no_defect_of_ours(tmp_path, monkeypatch):
    import bnre_exp.jobs.stages.fold as step

    monkeypatch.setattr(step, "compare_outputs", lambda *_, **__: Difference(math.nan, math.nan))
    with pytest.raises(
        UserError, match=r"training has most likely diverged \(top-1 before folding: 0\.\d+\); try a lower"
    ):
        job(tmp_path)
