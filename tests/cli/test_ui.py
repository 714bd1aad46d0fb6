"""bnre-exp ui: the right page of the right store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from bnre_exp.cli import ui
from bnre_exp.errors import UserError
from bnre_exp.tracking import open_run


def run(output: Path, folder: str, **more) -> Path:
    about = {"params": {}, "tags": {}, "output_dir": output, "experiment": "e", "run_name": folder, **more}
    with open_run(output / folder, **about) as log:
        log.metrics({"fold/top1": 0.5})
        log.tags({"bnre.headline": '{"name": "top1", "label": "top-1", "higher_is_better": true}'})
        if folder.endswith("sweep"):
            log.view(["seed"], ["fold/top1"], ["fold/top1"])
    return output / folder


def test_the_page_of_a_run_a_sweep_and_an_output_folder(tmp_path):
    alone = run(tmp_path, "runs/a")
    sweep = run(tmp_path, "multirun/sweep")
    job = run(tmp_path, "multirun/sweep/0", parent=sweep)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    page = ui.page_of(alone)
    assert (page.uri, page.metric, page.is_ascending, page.view) == (uri, "fold/top1", False, None)
    assert page.run and f"#/experiments/{page.experiment}/runs/{page.run}" in page.address("http://h")
    of_output = ui.page_of(tmp_path / "runs")
    assert f"#/experiments/{page.experiment}/runs?" in of_output.address("http://h")
    of_sweep = ui.page_of(sweep).view
    assert len(of_sweep) == 12 and f"viewStateShareKey={of_sweep}" in ui.page_of(sweep).address("http://h")
    assert ui.page_of(tmp_path).view == of_sweep  # the newest
    assert ui.page_of(job).run not in (None, page.run)
    for path in tmp_path.rglob("metrics.jsonl"):
        path.unlink()
    assert ui.page_of(tmp_path) == ui.Page(uri)
    with pytest.raises(UserError, match="no run that goes to MLflow"):
        ui.page_of(tmp_path / "runs")


def test_a_servers_page_is_opened_there(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    about = {"params": {}, "tags": {}, "output_dir": tmp_path, "experiment": "e", "run_name": "a"}
    with open_run(tmp_path / "a", uri="http://127.0.0.1:9", connect=False, **about):
        pass
    assert ui.main([str(tmp_path)]) == 0 and opened == ["http://127.0.0.1:9"]
    assert ui.main([str(tmp_path), "--no-browser"]) == 0 and len(opened) == 1
    assert capsys.readouterr().out == "http://127.0.0.1:9\n" * 2


def test_a_port_that_is_taken_and_a_store_that_is_not_there_are_told(tmp_path, capsys):
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert ui.main([str(tmp_path), "--no-browser", "--port", port]) == 2
    assert f"port {port} is taken" in capsys.readouterr().err
    assert ui.main(["--uri", f"sqlite:///{tmp_path}/nope.db", "--no-browser", "--port", port]) == 2
    assert "there is no store" in capsys.readouterr().err and not (tmp_path / "nope.db").exists()
    assert ui.main([str(tmp_path / "nowhere")]) == 2


@pytest.mark.slow
def test_the_server_is_started_answers_and_ends_with_ctrl_c(tmp_path):
    folder = run(tmp_path, "runs/a")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    code = "import sys; from bnre_exp.cli.ui import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder), "--no-browser", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert lines[1].startswith(f"http://127.0.0.1:{port}/#/experiments/")
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).status == 200
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == ""
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
