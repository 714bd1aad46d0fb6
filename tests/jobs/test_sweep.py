"""Sweeps as real processes: nested and compared, whatever launches them; killed and gone on with; several at once."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bnre_exp.cli import compare_runs
from bnre_exp.jobs.folders import RunRecord, read_record, write_record
from bnre_exp.jobs.sweep import _shared, best_trial
from bnre_exp.report.comparison import RunRow
from bnre_exp.tracking import read_runs
from bnre_exp.tracking.journal import Journal, read_records
from scripts.bench import kill_sweep
from tests.report.pages import read

NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.head = nn.Linear(16, 10)
    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))
"""
SMALL = [
    "model=custom", "model._target_=tiny.Net", "dataset.train_limit=256", "dataset.test_limit=64",
    "dataset.batch_size=32", "train.epochs=2", "qat.epochs=1", "quant.calib_batches=2", "export=checkpoint",
]  # fmt: skip
SWEEP = ["-m", *SMALL, "quant.weight_bits=3,4", "reest.num_batches=0,2", "qat.prepare=reestimate"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BNRE_OUTPUT_DIR", str(tmp_path / "out"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def command(*overrides: str, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bnre_exp", *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def finish(*overrides: str, status: int = 0) -> str:
    process = command(*overrides)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    return out + errors


def runs_of(output: Path, experiment: str = "bnre_exp"):
    return read_runs(f"sqlite:///{output / 'mlflow.db'}", experiment)


def tags_of(output: Path, run_id: str) -> dict[str, str]:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{output / 'mlflow.db'}").get_run(run_id).data.tags


def check_sweep(output: Path, jobs: int) -> tuple[dict, list[dict]]:
    """One parent, ``jobs`` nested runs, all FINISHED, the comparison attached; returns the parent and the jobs."""
    from mlflow import MlflowClient

    runs = runs_of(output)
    parents = [run for run in runs if run["parent"] is None]
    assert len(parents) == 1 and len(runs) == jobs + 1
    children = [run for run in runs if run["parent"] == parents[0]["id"]]
    assert len(children) == jobs and {run["status"] for run in runs} == {"FINISHED"}
    files = MlflowClient(f"sqlite:///{output / 'mlflow.db'}").list_artifacts(parents[0]["id"])
    assert {"comparison.md", "comparison.csv", "report.html"} <= {file.path for file in files}
    assert any(file.path.endswith(".png") for file in files) and any(file.path.endswith(".svg") for file in files)
    assert parents[0]["metrics"] == {"sweep/jobs": jobs, "sweep/finished": jobs}
    return parents[0], children


def test_the_picture_of_a_sweep_leaves_out_no_finished_run():
    with_it = RunRow("a", "FINISHED", {"n": "2", "wide": "1"}, {"ptq/top1": 0.5, "reest/top1": 0.6, "fold/top1": 0.6})
    without = RunRow("b", "FINISHED", {"n": "0"}, {"ptq/top1": 0.5, "fold/top1": 0.5})
    failed = RunRow("c", "FAILED", {"n": "9"}, {"ptq/top1": 0.1})
    metrics = ["ptq/top1", "reest/top1", "fold/top1"]
    assert _shared([with_it, without, failed], ["n", "wide"], metrics) == (["n"], ["ptq/top1", "fold/top1"])
    assert _shared([with_it, failed], ["n", "wide"], metrics) == (["n", "wide"], metrics)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_a_sweep_is_nested_compared_and_computes_each_stage_once(folder, launcher):
    said = finish(*SWEEP, f"hydra/launcher={launcher}")
    parent, children = check_sweep(folder / "out", 4)
    tags = [tags_of(folder / "out", run["id"]) for run in children]
    computed = {stage: sum(t.get(f"stage.{stage}") == "computed" for t in tags) for stage in ("fp32", "ptq", "qat")}
    assert computed == {"fp32": 1, "ptq": 2, "qat": 2}
    assert (
        "weight_bits" in said and "num_batches" in said and parent["id"][:12] in said
    )  # the table, and the link to it
    assert {run["name"].split(" resnet")[0].split(" Net-")[0] for run in children} == {
        f"weight_bits={bits} num_batches={batches}" for bits in "34" for batches in "02"
    }
    assert all("| stage |" in t["mlflow.note.content"] and "| fold |" in t["mlflow.note.content"] for t in tags)
    assert "| weight_bits | num_batches |" in tags_of(folder / "out", parent["id"])["mlflow.note.content"]
    (view,) = [r["view"] for r in read_records(next(folder.glob("out/multirun/*"))) if "view" in r]
    assert (
        view["ends"] == ["ptq/top1", "qat_start/top1", "qat/top1", "fold/top1", "fold/megabytes"]
        and "reest/top1" in view["metrics"]
    )  # in each of 4 runs
    threads = {run["params"]["runtime.threads"] for run in children}
    assert threads == {"null" if launcher == "basic" else str(max(1, len(os.sched_getaffinity(0)) // 4))} or (
        launcher == "joblib" and threads == {"1"}
    )
    assert compare_runs.main(["--sweep", parent["id"], "--to", str(folder / "compared")]) == 0
    page = read((folder / "compared" / "report.html").read_text(encoding="utf-8"))  # with links to where the runs are
    assert len(page.links) == 4 and all((folder / "compared" / link).resolve().is_file() for link in page.links)
    rows = list(csv.DictReader((folder / "compared" / "comparison.csv").open()))
    assert {(row["quant.weight_bits"], row["reest.num_batches"]) for row in rows} == {
        (bits, batches) for bits in "34" for batches in "02"
    }
    assert compare_runs.main(["--filter", "params.quant.weight_bits = '3'", "--to", str(folder / "three")]) == 0
    assert len(list(csv.DictReader((folder / "three" / "comparison.csv").open()))) == 2
    assert compare_runs.main(["--sweep", "nothing", "--to", str(folder / "none")]) == 2


def test_the_best_trial_of_a_search_is_told_with_its_value_and_folder(tmp_path):
    write_record(tmp_path, RunRecord("sweep", "sweep", time.time() - 10))
    assert best_trial(tmp_path) is None
    for number, bits in enumerate((2, 3, 33)):
        job = tmp_path / str(number)
        job.mkdir()
        write_record(job, RunRecord("job", f"{number}: quant.weight_bits={bits} qat.lr=1e-05", time.time()))
        with Journal(job) as journal:
            journal.add("params", {"objective": "null", "quant.weight_bits": str(bits)})
    results = tmp_path / "optimization_results.yaml"
    results.write_text(
        "name: optuna\nbest_params:\n  quant.weight_bits: 3\n  qat.lr: 1.0e-05\nbest_value: 0.93359375\n"
    )
    assert best_trial(tmp_path) == f"quant.weight_bits=3 qat.lr=1e-05: fold/val_top1 0.933594 ({tmp_path / '1'})"
    os.utime(results, (0, 0))  # left by another search, in a folder that the user chose
    assert best_trial(tmp_path) is None


@pytest.mark.slow
def test_a_search_optimizes_a_metric_of_validation_data(folder):
    said = finish(
        "-m", *SMALL, "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1", "quant.weight_bits=choice(2,3,4)",
    )  # fmt: skip
    parent, children = check_sweep(folder / "out", 3)
    (results,) = folder.glob("out/multirun/*/optimization_results.yaml")
    best = max(run["metrics"]["fold/val_top1"] for run in children)
    assert f"best_value: {best}" in results.read_text()
    (told,) = [line.removeprefix("best trial: ") for line in said.splitlines() if line.startswith("best trial: ")]
    assert told.startswith("quant.weight_bits=") and f"fold/val_top1 {best:.6g} (" in told
    record = read_record(results.parent)
    assert record is not None and record.best == told == tags_of(folder / "out", parent["id"])["best"]


@pytest.mark.slow
def test_jobs_that_fail_leave_the_others_and_a_final_status(folder):
    said = finish("-m", *SMALL, "reest.num_batches=2", "fp32.min_top1=0,1.0", "hydra/launcher=joblib", status=2)
    assert "1 job(s) of this multirun failed" in said and "is worse than fp32.min_headline=1.0" in said
    runs = runs_of(folder / "out")
    assert sorted(run["status"] for run in runs if run["parent"]) == ["FAILED", "FINISHED"]
    (parent,) = [run for run in runs if run["parent"] is None]
    assert parent["status"] == "FAILED" and parent["metrics"] == {"sweep/jobs": 2, "sweep/finished": 1}


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_as_if_it_had_not_been(folder):
    overrides = [*SWEEP, "train.epochs=6", "qat.epochs=4"]
    undisturbed = kill_sweep.start(folder / "undisturbed", overrides)
    assert undisturbed.wait() == 0
    draw = random.Random(int(os.environ.get("BNRE_KILL_SEED", "0")))
    assert kill_sweep.kill_at_random(folder / "killed", overrides, kills=4, longest=12, draw=draw) > 0
    found = kill_sweep.differences(kill_sweep.measured(folder / "killed"), kill_sweep.measured(folder / "undisturbed"))
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_repeated_command_goes_on_with_the_same_run(folder, number):
    overrides = [*SMALL, "qat.epochs=60", "reest.num_batches=2"]
    process = command(*overrides)
    for line in process.stdout:
        if "qat epoch 2/60" in line:
            break
    process.send_signal(number)
    process.communicate(timeout=60)
    (before,) = runs_of(folder / "out")
    assert before["status"] == ("KILLED" if number == signal.SIGTERM else "RUNNING")
    finish(*SMALL, "reest.num_batches=2", "seed=1")  # another command: closes what is dead, and goes on with nothing
    first = {run["id"]: run for run in runs_of(folder / "out")}[before["id"]]
    assert first["status"] == "KILLED" and len(runs_of(folder / "out")) == 2
    said = finish(*overrides)
    assert "Going on with what was interrupted" in said and "resumed" in said
    runs = {run["id"]: run for run in runs_of(folder / "out")}
    assert len(runs) == 2 and {run["status"] for run in runs.values()} == {"FINISHED"}
    whole = finish(*overrides, "store.mode=off", "tracking.experiment=whole")
    assert "resumed" not in whole
    (undisturbed,) = runs_of(folder / "out", "whole")
    for name, value in undisturbed["metrics"].items():
        assert "seconds" in name or runs[before["id"]]["metrics"][name] == value, name
    assert len(list((folder / "out" / "runs").iterdir())) == 3


@pytest.mark.slow
def test_eight_processes_at_once_on_a_fresh_store_and_a_fresh_database(folder):
    processes = [command(*SMALL, f"reest.num_batches={n}", "qat.prepare=reestimate") for n in range(8)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, errors
    runs = runs_of(folder / "out")
    assert sorted(run["params"]["reest.num_batches"] for run in runs) == [str(number) for number in range(8)]
    assert {run["status"] for run in runs} == {"FINISHED"} and {run["parent"] for run in runs} == {None}
    tags = [tags_of(folder / "out", run["id"]) for run in runs]
    assert [sorted(t[f"stage.{stage}"] for t in tags).count("computed") for stage in ("fp32", "ptq", "qat")] == [1] * 3
    names = {name for run in runs for name in run["metrics"] if name.startswith("fp32/")}
    assert all(names <= run["metrics"].keys() for run in runs)


@pytest.mark.slow
def test_ctrl_c_closes_the_sweep_and_its_job(folder):
    process = command(
        *SWEEP, "qat.epochs=500", start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )  # fmt: skip
    for line in process.stdout:
        if "qat epoch 1/500" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and errors.count("Interrupted") == 1 and "Traceback" not in errors
    assert sorted(run["status"] for run in runs_of(folder / "out")) == ["KILLED", "KILLED"]
    (sweep,) = (folder / "out" / "multirun").iterdir()
    assert read_record(sweep).status == read_record(sweep / "0").status == "KILLED"


@pytest.mark.slow
def test_a_hidden_change_of_the_users_code_or_data_is_no_reuse(folder):
    def stages() -> dict[str, str]:
        newest = max(runs_of(folder / "out"), key=lambda run: tags_of(folder / "out", run["id"])["run_dir"])
        tags = tags_of(folder / "out", newest["id"])
        return {key.removeprefix("stage."): value for key, value in tags.items() if key.startswith("stage.")}

    finish(*SMALL, "reest.num_batches=2")
    assert set(stages().values()) == {"computed"}
    time.sleep(0.01)
    finish(*SMALL, "reest.num_batches=2", "qat.lr=0.02")
    assert stages() == {
        **dict.fromkeys(["fp32", "ptq", "reest_only", "qat_start"], "reused"),
        **dict.fromkeys(["qat", "reest", "fold", "export"], "computed"),
    }
    (folder / "tiny.py").write_text(NET.replace("mean((2, 3))", "amax((2, 3))"))  # same weights, another function
    finish(*SMALL, "reest.num_batches=2")
    assert set(stages().values()) == {"computed"}
