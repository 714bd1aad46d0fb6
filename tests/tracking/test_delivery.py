"""A tracking server that is down, silent, or dies: the run goes on, and sync brings the rest there exactly once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from bnre_exp.cli import sync_mlflow
from bnre_exp.errors import UserError
from bnre_exp.tracking import delivery, end_run, open_run, read_runs, stores, sync, undelivered
from bnre_exp.tracking.journal import Journal, last_metrics, read_records
from tests.tracking.serving import served


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def server(folder: Path, port: int):
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start(folder: Path, uri: str, name: str = "run", **more):
    arguments = {"params": {"seed": 0}, "tags": {}, "experiment": "tests", "run_name": name, **more}
    return open_run(folder / "runs" / name, output_dir=folder, uri=uri, **arguments)


def work(log, numbers) -> None:
    for number in numbers:
        log.metrics({"fp32/train_loss": 1 / (number + 1)}, step=number)


def history(uri: str, run_id: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, "fp32/train_loss")]


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_has_everything_once(tmp_path, caplog):
    port = free_port()
    uri, store = f"http://127.0.0.1:{port}", tmp_path / "server"
    report = tmp_path / "runs" / "late" / "report.md"
    report.parent.mkdir(parents=True)
    report.write_text("# report")
    with start(tmp_path, uri, "late") as log:  # the server is down from the start
        work(log, range(3))
        log.artifact(report)
        assert log.run_id is None and log.undelivered == 6
    with server(store, port) as process:
        with start(tmp_path, uri, "cut") as log:
            work(log, range(2))
            log.settle()
            assert log.undelivered == 0 and log.run_id is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            started = time.monotonic()
            work(log, range(2, 30))
            assert time.monotonic() - started < 8
        assert time.monotonic() - started < 12 and log.undelivered == 29
    assert sum("does not take records" in r.getMessage() for r in caplog.records) == 2  # once a run
    assert [path.name for path in sync_mlflow.waiting(tmp_path)] == ["cut", "late"]
    assert sync_mlflow.main([str(tmp_path)]) == 1  # still down: said, nothing lost
    with server(store, port):
        assert sync_mlflow.main([str(tmp_path)]) == 0
        assert sync_mlflow.waiting(tmp_path) == [] and sync_mlflow.main([str(tmp_path)]) == 0
        for note in tmp_path.glob("runs/*/mlflow.json"):  # as if killed between sending and taking note of it
            note.write_text(json.dumps({**json.loads(note.read_text()), "count": 0}))
        assert sync_mlflow.main([str(tmp_path)]) == 0
        runs = {run["name"]: run for run in read_runs(uri, "tests")}
        assert set(runs) == {"late", "cut"} and {run["status"] for run in runs.values()} == {"FINISHED"}
        assert history(uri, runs["cut"]["id"]) == [(n, 1 / (n + 1)) for n in range(30)]
        assert history(uri, runs["late"]["id"]) == [(n, 1 / (n + 1)) for n in range(3)]
        assert runs["late"]["params"] == {"seed": "0"}


def test_a_server_that_accepts_and_stays_silent_costs_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with start(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}") as log:
            work(log, range(50))
        assert time.monotonic() - started < 10 and log.undelivered == 53
    assert len(read_records(tmp_path / "runs" / "run")) == 53


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def test_a_folder_goes_on_with_its_run_and_logs_nothing_twice(tmp_path):
    with pytest.raises(KeyboardInterrupt), start(tmp_path, sqlite(tmp_path)) as log:
        work(log, range(3))
        raise KeyboardInterrupt
    (run,) = read_runs(sqlite(tmp_path), "tests")
    assert run["status"] == "KILLED"
    with start(tmp_path, sqlite(tmp_path)) as log:
        (run,) = read_runs(sqlite(tmp_path), "tests")
        assert run["status"] == "RUNNING" and log.run_id == run["id"]
        work(log, range(5))
        log.tag_once("stage.fp32", "reused")
        log.tag_once("stage.fp32", "computed")
    (run,) = read_runs(sqlite(tmp_path), "tests")
    assert run["status"] == "FINISHED" and log.undelivered == 0
    assert history(sqlite(tmp_path), run["id"]) == [(n, 1 / (n + 1)) for n in range(5)]
    from mlflow import MlflowClient

    tags = MlflowClient(sqlite(tmp_path)).get_run(run["id"]).data.tags
    assert tags["stage.fp32"] == "reused" and "error" not in tags
    assert last_metrics(read_records(log.run_dir)) == {"fp32/train_loss": 0.2}


def test_a_run_whose_process_died_is_closed(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from bnre_exp.tracking import open_run\n"
        "out = Path(sys.argv[1])\n"
        "about = dict(params={}, tags={}, output_dir=out, experiment='tests', run_name='run')\n"
        "with open_run(out / 'runs/run', **about) as log:\n"
        "    log.metrics({'fp32/top1': 0.5})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert read_runs(sqlite(tmp_path), "tests")[0]["status"] == "RUNNING"
    end_run(tmp_path / "runs" / "run", "KILLED")
    (run,) = read_runs(sqlite(tmp_path), "tests")
    assert run["status"] == "KILLED" and run["metrics"] == {"fp32/top1": 0.5}


def test_nested_runs_find_their_parent_whoever_comes_first(tmp_path):
    sweep = tmp_path / "multirun" / "a"
    about = {"params": {}, "tags": {}, "output_dir": tmp_path, "experiment": "tests", "run_name": "sweep"}
    with open_run(sweep, **about) as parent, start(tmp_path, sqlite(tmp_path), "job", parent=sweep) as child:
        pass
    runs = {run["name"]: run for run in read_runs(sqlite(tmp_path), "tests")}
    assert runs["job"]["parent"] == parent.run_id == runs["sweep"]["id"] and child.run_id == runs["job"]["id"]
    only = read_runs(sqlite(tmp_path), "tests", f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert [run["name"] for run in only] == ["job"]
    with pytest.raises(UserError, match="no experiment 'nope'"):
        read_runs(sqlite(tmp_path), "nope")


def test_a_store_that_was_lost_gets_everything_again(tmp_path):
    with start(tmp_path, sqlite(tmp_path)) as log:
        work(log, range(2))
    (tmp_path / "mlflow.db").unlink()
    assert undelivered(log.run_dir) == 0
    with start(tmp_path, sqlite(tmp_path)) as log:
        work(log, range(3))
    (run,) = read_runs(sqlite(tmp_path), "tests")
    assert history(sqlite(tmp_path), run["id"]) == [(n, 1 / (n + 1)) for n in range(3)]


def test_a_journal_cut_in_the_middle_of_a_line_goes_on(tmp_path):
    with Journal(tmp_path) as journal:
        journal.add("metrics", {"a": 1.0}, step=0)
        assert journal.add("metrics", {"a": 1.0}, step=0) is False and journal.add("metrics", {"a": 1.0}, step=1)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"time": 1, "metr')
    with Journal(tmp_path) as journal:
        assert len(journal.records) == 2 and journal.add("metrics", {"a": 2.0}, step=2)
    assert [record["step"] for record in read_records(tmp_path)] == [0, 1, 2]
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 3


def test_damaged_lines_are_left_out_and_nothing_else_is_lost(tmp_path, caplog):
    with Journal(tmp_path) as journal:
        for step in range(4):
            journal.add("metrics", {"a": 1.0}, step=step)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"\x00" + b"".join(lines[:2]) + b"{]\n" + b"".join(lines[2:]))
    with Journal(tmp_path) as journal:
        assert [record["step"] for record in journal.records] == [1, 2, 3]
        journal.add("metrics", {"a": 1.0}, step=4)
    assert "2 lines" in caplog.text and (tmp_path / "metrics.jsonl.damaged").exists()
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3, 4]


def test_a_lost_note_makes_no_second_run(tmp_path):
    with start(tmp_path, sqlite(tmp_path)) as log:
        work(log, range(2))
    (log.run_dir / "mlflow.json").write_text("")
    with start(tmp_path, sqlite(tmp_path)) as log:
        work(log, range(3))
    (run,) = read_runs(sqlite(tmp_path), "tests")
    assert history(sqlite(tmp_path), run["id"]) == [(n, 1 / (n + 1)) for n in range(3)]


def test_a_run_deleted_in_the_ui_keeps_its_records(tmp_path, caplog):
    from mlflow import MlflowClient

    with start(tmp_path, sqlite(tmp_path)) as log:
        work(log, range(2))
        MlflowClient(sqlite(tmp_path)).delete_run(log.run_id)
        work(log, range(2, 5))
    assert log.undelivered == 4 and caplog.text.count("was deleted in MLflow") == 1
    with pytest.raises(UserError, match="restore it"):
        sync(log.run_dir)
    MlflowClient(sqlite(tmp_path)).restore_run(log.run_id)
    assert sync(log.run_dir) == (4, 0)
    assert history(sqlite(tmp_path), log.run_id) == [(n, 1 / (n + 1)) for n in range(5)]


def test_a_store_that_is_busy_at_the_start_is_no_mistake(tmp_path, monkeypatch):
    import sqlite3

    with start(tmp_path, sqlite(tmp_path), "first"):
        pass
    monkeypatch.setattr(stores, "PATIENCE", 0.1)
    monkeypatch.setattr(delivery, "PAUSE", 0.0)
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with start(tmp_path, sqlite(tmp_path), "second") as log:
        assert log.run_id is None
        other.execute("ROLLBACK")
        other.close()
        work(log, range(2))
        assert log.undelivered == 0
    assert [run["name"] for run in read_runs(sqlite(tmp_path), "tests")] == ["first", "second"]


def test_without_mlflow_there_is_nothing_to_deliver(tmp_path):
    with open_run(
        tmp_path / "runs" / "a", params={}, tags={}, output_dir=tmp_path, experiment="t", run_name="a", enabled=False
    ):
        pass
    assert undelivered(tmp_path / "runs" / "a") == 0 and sync(tmp_path / "runs" / "a") == (0, 0)


def calls(server) -> list[str]:
    return [call for call in server.calls if "health" not in call]


def test_what_cannot_be_synced_is_told_once_and_runs_are_counted_once(tmp_path, capsys, caplog, monkeypatch):
    about = {"params": {}, "tags": {}, "output_dir": tmp_path, "experiment": "e", "run_name": "a"}
    with open_run(tmp_path / "a", uri="http://127.0.0.1:9", connect=False, **about) as log:
        log.metrics({"fp32/top1": 0.5})
    caplog.clear()
    assert sync_mlflow.main([str(tmp_path)]) == 1 and "Connection refused" in capsys.readouterr().out
    assert "does not take records" not in caplog.text  # nor does "the run go on"
    monkeypatch.chdir(tmp_path)
    assert sync_mlflow.main([".", "--uri", "sqlite:///mlflow.db"]) == 0
    assert "records of 1 runs delivered" in capsys.readouterr().out


def test_a_slow_server_gets_few_calls_and_keeps_nobody_waiting(tmp_path, migrated, monkeypatch, caplog):
    shutil.copy(migrated, tmp_path / "mlflow.db")
    monkeypatch.setattr(delivery, "FIRST_WAIT", 0.0)
    with served(tmp_path, monkeypatch) as server:
        held = server.gate = threading.Event()
        with start(tmp_path, server.uri) as log:
            work(log, range(30))
            log.tags({"a": "b"})
            log.dataset("digits", "0123", "scikit-learn", "train", {"images": 1})
            assert log.undelivered == 34  # it has not answered once
            held.set()
            log.settle()
            assert log.undelivered == 0
            # the run, its params, and all of it in one call of each kind
            batches = [call for call in calls(server) if "log-batch" in call or "log-inputs" in call]
            assert batches == ["POST runs/log-batch", "POST runs/log-inputs"]
            held.clear()
            monkeypatch.setattr(log._delivery, "_waiting_left", 0.3)
            work(log, range(30, 60))
        assert log.undelivered == 31 and "is slow: 31 records" in caplog.text and "bnre-exp-sync" in caplog.text
        held.set()
        wait_for(lambda: not log._delivery._is_running())
        assert sync_mlflow.main([str(tmp_path)]) == 0
        (run,) = read_runs(server.uri, "tests")
        assert history(server.uri, run["id"]) == [(n, 1 / (n + 1)) for n in range(60)]
        assert run["status"] == "FINISHED" and run["tags"]["a"] == "b"


def wait_for(condition) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it does not happen")


def test_a_refused_record_costs_those_beside_it_nothing(tmp_path, migrated, monkeypatch, caplog):
    shutil.copy(migrated, tmp_path / "mlflow.db")
    with served(tmp_path, monkeypatch) as server:
        server.gate = threading.Event()
        monkeypatch.setattr(delivery, "FIRST_WAIT", 0.0)
        with start(tmp_path, server.uri) as log:
            work(log, range(3))
            log._add("params", {"seed": "1"})  # MLflow does not let a param change
            work(log, range(3, 6))
            server.gate.set()
        (run,) = read_runs(server.uri, "tests")
        assert log.undelivered == 0 and run["params"] == {"seed": "0"}
        assert history(server.uri, run["id"]) == [(n, 1 / (n + 1)) for n in range(6)]
    assert caplog.text.count("MLflow refuses a record") == 1


def test_a_mistake_that_a_slow_server_tells_late_is_told(tmp_path, migrated, monkeypatch, caplog):
    from mlflow import MlflowClient

    shutil.copy(migrated, tmp_path / "mlflow.db")
    client = MlflowClient(sqlite(tmp_path))
    client.delete_experiment(client.create_experiment("tests"))
    with served(tmp_path, monkeypatch) as server:
        with pytest.raises(UserError, match="experiment 'tests' is deleted"), start(tmp_path, server.uri, "a"):
            raise AssertionError("the run must not start")
        monkeypatch.setattr(delivery, "FIRST_WAIT", 0.0)
        server.gate = threading.Event()
        with start(tmp_path, server.uri, "b") as log:
            server.gate.set()
            work(log, range(2))
    assert log.undelivered == 5 and "experiment 'tests' is deleted" in caplog.text
