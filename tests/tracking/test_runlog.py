"""A run in MLflow and in metrics.jsonl, in every way that it can end."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bnre_exp.errors import Terminated, UserError
from bnre_exp.jobs.provenance import git_tags
from bnre_exp.tracking import open_run
from bnre_exp.tracking.charts import charts
from bnre_exp.tracking.journal import curves, read_records
from bnre_exp.tracking.links import compare_link, ui_command
from bnre_exp.tracking.typed_text import typed

PARAMS = {
    "quant.weight_bits": 3,
    "quant.act_bits": None,
    "quant.per_channel": True,
    "dataset.mean": [0.5, 1],
    "model.name": "resnet18",
    "quant.overrides[0].pattern": "layer3.*",
}


@pytest.fixture
def output_dir(tmp_path, migrated):
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return tmp_path


def start(output_dir: Path, name: str = "run", **more):
    arguments = {"params": PARAMS, "tags": {"overrides": "a=1"}, "experiment": "tests", "run_name": name, **more}
    return open_run(output_dir / name, output_dir=output_dir, **arguments)


def client(output_dir: Path):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")


def lines(output_dir: Path, kind: str = "metrics", name: str = "run") -> list[dict]:
    records = [json.loads(line) for line in (output_dir / name / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if kind in record]


def test_params_as_typed_metrics_with_steps_tags_and_status(output_dir):
    with start(output_dir) as log:
        log.metrics({"fp32/top1": 0.97, "fp32/loss": float("nan")})
        for epoch in (1, 2):
            log.metrics({"fp32/train_loss": 1.0 / epoch}, step=epoch)
    run = client(output_dir).get_run(log.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert client(output_dir).get_experiment(run.info.experiment_id).name == "tests"
    expected = {"quant.weight_bits": "3", "quant.act_bits": "null", "quant.per_channel": "true"}
    assert expected.items() <= run.data.params.items() and run.data.params["dataset.mean"] == "[0.5, 1]"
    assert run.data.params["quant.overrides_0_.pattern"] == "layer3.*"
    assert run.data.metrics["fp32/top1"] == 0.97
    history = client(output_dir).get_metric_history(log.run_id, "fp32/train_loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5)]
    assert {"overrides": "a=1", "run_dir": str(output_dir / "run")}.items() <= run.data.tags.items()
    assert run.data.tags["host"] and log.undelivered == 0
    local = lines(output_dir)
    assert local[0]["metrics"] == {"fp32/top1": 0.97, "fp32/loss": "nan"} and local[2]["step"] == 2
    assert lines(output_dir, "status")[-1]["status"] == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("no such data"), "FAILED"),
        (RuntimeError("defect"), "FAILED"),
        (OSError(28, "No space left on device"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Terminated(), "KILLED"),
    ],
)
def test_a_run_that_does_not_finish_says_so(output_dir, error, status):
    with pytest.raises(type(error)), start(output_dir) as log:
        log.metrics({"fp32/top1": 0.5})
        raise error
    run = client(output_dir).get_run(log.run_id)
    assert run.info.status == status and run.data.metrics == {"fp32/top1": 0.5}
    assert run.data.tags["error"].startswith(type(error).__name__) and str(error) in run.data.tags["error"]
    (end,) = lines(output_dir, "status")
    assert end["status"] == status and end["error"] == run.data.tags["error"]


def test_checkpoint_is_listed_as_a_model_of_the_run(output_dir):
    folder = output_dir / "run" / "folded"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"12345")
    with start(output_dir) as log:
        log.model(folder, "resnet18 w3a8", "a checkpoint", PARAMS, {"fold/top1": 0.9})
    (model,) = client(output_dir).search_logged_models([log.experiment_id])
    assert str(model.status).endswith("READY") and model.source_run_id == log.run_id
    assert [(m.key, m.value) for m in model.metrics] == [("fold/top1", 0.9)]
    assert [f.path for f in client(output_dir).list_logged_model_artifacts(model.model_id)] == ["weights.safetensors"]
    run = client(output_dir).get_run(log.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert Path(model.artifact_location.removeprefix("file://")).is_relative_to(output_dir)


def test_data_sets_and_artifacts(output_dir):
    report = output_dir / "run" / "report.md"
    report.parent.mkdir()
    report.write_text("# report")
    with start(output_dir) as log:
        log.dataset("digits", "0123", "scikit-learn", "train", {"images": 1293})
        log.dataset("digits", "4567", "scikit-learn", "test", {"images": 360})
        log.artifact(report)
        log.tags({"preprocessing": "x" * 10_000})
    inputs = client(output_dir).get_run(log.run_id).inputs.dataset_inputs
    assert {(i.dataset.digest, i.tags[0].value) for i in inputs} == {("0123", "train"), ("4567", "test")}
    assert [f.path for f in client(output_dir).list_artifacts(log.run_id)] == ["report.md"]
    assert log.undelivered == 0


def test_runs_one_after_another_do_not_mix(output_dir):
    ids = []
    for name in ("one", "two"):
        with start(output_dir, name) as log:
            log.metrics({f"{name}/top1": 0.5})
        ids.append(log.run_id)
    assert [list(client(output_dir).get_run(run).data.metrics) for run in ids] == [["one/top1"], ["two/top1"]]
    import mlflow

    assert mlflow.active_run() is None


def test_mlflow_failing_midway_keeps_the_local_metrics_and_warns_once(output_dir, caplog):
    with start(output_dir) as log:
        log.metrics({"fp32/top1": 0.5})
        with sqlite3.connect(output_dir / "mlflow.db") as connection:
            connection.execute("DROP TABLE metrics")
            connection.execute("DROP TABLE latest_metrics")
        log.metrics({"ptq/top1": 0.4})
        log.metrics({"reest/top1": 0.45})
    assert log.undelivered == 3  # two records and the end of the run
    assert [line["metrics"] for line in lines(output_dir)[:3]] == [
        {"fp32/top1": 0.5},
        {"ptq/top1": 0.4},
        {"reest/top1": 0.45},
    ]
    warnings = [r.getMessage() for r in caplog.records if "does not take records" in r.getMessage()]
    assert len(warnings) == 1 and str(output_dir / "run" / "metrics.jsonl") in warnings[0]


@pytest.mark.parametrize("uri", ["nonsense://x", "sqlite:////proc/nowhere/mlflow.db"])
def test_a_store_that_cannot_be_opened_is_a_users_mistake(tmp_path, uri):
    with pytest.raises(UserError, match=r"tracking.uri[\s\S]*tracking.enabled=false"), start(tmp_path, uri=uri):
        raise AssertionError("the run must not start")


def test_without_mlflow_only_the_local_file_is_written(tmp_path):
    with start(tmp_path, enabled=False) as log:
        log.metrics({"fp32/top1": 0.5})
        log.tags({"a": "b"})
    assert log.run_id is None and not (tmp_path / "mlflow.db").exists()
    assert lines(tmp_path)[0]["metrics"] == {"fp32/top1": 0.5}


def test_importing_the_module_does_not_import_mlflow():
    code = "import sys, bnre_exp.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_processes_at_once_on_a_fresh_store_all_get_their_run(tmp_path):
    code = (
        "import sys; from pathlib import Path; from bnre_exp.tracking import open_run\n"
        "out, name = Path(sys.argv[1]), sys.argv[2]\n"
        "with open_run(out / name, params={}, tags={}, output_dir=out, experiment='parallel', run_name=name) as log:\n"
        "    [log.metrics({'x': i}, step=i) for i in range(20)]\n"
        "sys.exit(log.undelivered)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), f"run{i}"]) for i in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    experiment = client(tmp_path).get_experiment_by_name("parallel")
    runs = client(tmp_path).search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == [f"run{i}" for i in range(4)]
    assert all(run.info.status == "FINISHED" and run.data.metrics == {"x": 19.0} for run in runs)


def test_a_database_that_was_killed_while_it_was_made_is_made_anew(tmp_path):
    left = tmp_path / ".mlflow.db.0123"
    with sqlite3.connect(left) as connection:
        connection.execute("CREATE TABLE datasets (x)")
    with start(tmp_path) as log:
        log.metrics({"fp32/top1": 0.5})
    assert client(tmp_path).get_run(log.run_id).data.metrics == {"fp32/top1": 0.5} and log.undelivered == 0
    assert not list(tmp_path.glob(".mlflow.db*"))


def test_git_tags(tmp_path):
    assert git_tags(tmp_path) == {}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "--allow-empty", "-m", "x"]):
        (tmp_path / "file").write_text("1")
        subprocess.run([*git, *arguments], check=True)
    assert git_tags(tmp_path)["git.dirty"] == "false" and len(git_tags(tmp_path)["git.commit"]) == 40
    (tmp_path / "file").write_text("2")
    assert git_tags(tmp_path)["git.dirty"] == "true"


def test_commands_for_people(tmp_path, monkeypatch):
    folder, program = Path("/a b/runs/1"), tmp_path / "python"
    monkeypatch.setattr("sys.executable", str(program))
    assert ui_command("sqlite:////a b/mlflow.db", folder) == f"{program} -m bnre_exp ui '/a b/runs/1'"
    (tmp_path / "bnre-exp").touch(0o755)
    assert ui_command("sqlite:////a b/mlflow.db", folder) == f"{tmp_path}/bnre-exp ui '/a b/runs/1'"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ui_command("sqlite:////a b/mlflow.db", folder) == "bnre-exp ui '/a b/runs/1'"
    assert ui_command("http://host:5000", folder) == "open http://host:5000 in a browser"
    assert compare_link("7", "fold/top1", False).startswith("http://127.0.0.1:5000/#/experiments/7/runs?")
    assert compare_link("7", "fold/top1", False, view="abc").endswith("compareRunsMode=CHART&viewStateShareKey=abc")


def fill_the_disk(log) -> None:
    log._journal._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115


@pytest.mark.parametrize("error", [None, ValueError("the real cause"), KeyboardInterrupt()])
def test_a_full_disk_neither_hides_the_error_nor_leaves_the_run_running(output_dir, error):
    with pytest.raises(type(error) if error else OSError) as raised, start(output_dir) as log:
        fill_the_disk(log)
        if error:
            raise error
        log.metrics({"fp32/top1": 0.5})
    run = client(output_dir).get_run(log.run_id)
    assert run.info.status == ("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
    assert run.data.tags["error"].startswith(type(raised.value).__name__)


def test_a_disk_that_is_full_at_the_end_fails_the_run(output_dir):
    with pytest.raises(OSError, match="No space"), start(output_dir) as log:
        fill_the_disk(log)
    assert client(output_dir).get_run(log.run_id).info.status == "FAILED"


def test_a_store_that_another_program_locks_is_not_waited_for(output_dir, monkeypatch):
    monkeypatch.setattr("bnre_exp.tracking.stores.PATIENCE", 0.1)
    with start(output_dir) as log:
        other = sqlite3.connect(output_dir / "mlflow.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        log.metrics({"ptq/top1": 0.4})
        waited = time.monotonic() - started
        other.execute("ROLLBACK")
        other.close()
        log.metrics({"reest/top1": 0.5})
    assert waited < 10  # MLflow by itself waits 20 s
    assert log.undelivered == 0  # delivered at the end
    assert client(output_dir).get_run(log.run_id).data.metrics == {"ptq/top1": 0.4, "reest/top1": 0.5}


def test_names_that_mlflow_does_not_take_cost_nothing_else(output_dir):
    params = {"a[0]": 1, "a_0_": 2, "model.kwargs": {"deep": True, "name": None}, "tags": ["a b", "null", "c"]}
    with start(output_dir, params=params) as log:
        log.metrics({"good": 1.0, "layer[0]+x": 2.0})
    run = client(output_dir).get_run(log.run_id)
    assert log.undelivered == 0 and run.data.metrics == {"good": 1.0, "layer_0__x": 2.0}
    assert run.data.params == {
        "a_0_": "1", "a_0__": "2", "model.kwargs": "{deep: true, name: null}", "tags": "['a b', 'null', c]",
    }  # fmt: skip


def test_params_are_what_hydra_reads_back():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for value in ([0.5, 1, None], {"a": [True, 1e-5], "b": "it's"}, ["null", "1", "a b", "layer3.*"], None, False, 3):
        override = OverridesParser.create().parse_override(f"key={typed(value)}")
        assert override.value() == value


def test_a_user_without_a_name(output_dir, monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    with start(output_dir) as log:
        pass
    assert client(output_dir).get_run(log.run_id).data.tags["mlflow.user"] == str(2**31 - 7)


def test_what_is_not_finite_is_a_tag_and_no_number(output_dir, caplog):
    caplog.set_level("INFO")
    values = {"loss": float("inf"), "best": float("-inf"), "fp32/nan": float("nan"), "fp32/top1": 0.5}
    folder = output_dir / "run" / "folded"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"12345")
    with start(output_dir) as log:
        log.metrics(values, step=3)
        log.model(folder, "net", "a checkpoint", {}, values)
    run = client(output_dir).get_run(log.run_id)
    assert run.data.metrics == {"fp32/top1": 0.5} and log.undelivered == 0
    tags = {name: text for name, text in run.data.tags.items() if name.startswith("not_finite.")}
    assert tags == {
        "not_finite.loss": "inf (step 3)", "not_finite.best": "-inf (step 3)", "not_finite.fp32/nan": "nan (step 3)",
    }  # fmt: skip
    assert lines(output_dir)[0]["metrics"] == {"loss": "inf", "best": "-inf", "fp32/nan": "nan", "fp32/top1": 0.5}
    (model,) = client(output_dir).search_logged_models([log.experiment_id])
    assert [(m.key, m.value) for m in model.metrics] == [("fp32/top1", 0.5)]
    assert "loss=inf" in caplog.text


def test_what_is_too_long_for_mlflow_says_that_it_is_cut(output_dir, caplog):
    with start(output_dir, params={"long": "x" * 6001, "fits": "y" * 6000}, run_name="n" * 300) as log:
        log.tags({"t": "z" * 9000})
        log.note("| a |\n" * 2000)
    run = client(output_dir).get_run(log.run_id)
    assert run.data.params["long"] == "x" * 5993 + "… (cut)" and run.data.params["fits"] == "y" * 6000
    assert run.data.tags["t"].endswith("z… (cut)") and run.info.run_name == "n" * 243 + "… (cut)"
    note = run.data.tags["mlflow.note.content"]
    assert (
        len(note) <= 5000
        and note.startswith("| a |\n| a |")
        and note.endswith("| a |\n\n… The rest is among the artifacts.\n")
    )
    (told,) = [record.getMessage() for record in caplog.records if "config.yaml" in record.getMessage()]
    assert told == "long: MLflow takes 6000 characters; config.yaml has the whole." and log.undelivered == 0


def test_parallel_coordinates_have_what_all_runs_have():
    (chart,) = [
        chart
        for chart in charts("p", ["reest.num_batches"], ["reest/top1", "fold/top1"], False, ["fold/top1"])[
            "compareRunCharts"
        ]
        if chart["type"] == "PARALLEL"
    ]
    assert chart["selectedMetrics"] == ["fold/top1"] and chart["selectedParams"] == ["reest.num_batches"]
    earlier = charts("p", [], ["reest/top1", "fold/top1"])["compareRunCharts"][0]  # as earlier journals say it
    assert earlier["selectedMetrics"] == ["reest/top1", "fold/top1"]


def test_curves_are_what_was_logged_by_step(tmp_path):
    with open_run(tmp_path / "run", params={}, tags={}, output_dir=tmp_path, experiment="x", run_name="x",
                  enabled=False) as log:  # fmt: skip
        log.metrics({"qat/train_loss": 0.3}, 2)
        log.metrics({"qat/train_loss": 0.5, "qat/val_top1": math.nan}, 1)
        log.metrics({"qat/top1": 0.9})
        log.metrics({"qat/train_loss": 0.2}, 2)  # computed again after an interruption
    found = curves(read_records(tmp_path / "run"))
    assert list(found["qat/train_loss"].items()) == [(1, 0.5), (2, 0.2)]
    assert math.isnan(found["qat/val_top1"][1]) and set(found) == {"qat/train_loss", "qat/val_top1"}
