"""Credentials in tracking.uri, wherever it is written: the job has them, and no file, no console, no message."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bnre_exp.credentials import PASSWORD, TOKEN, USERNAME
from tests.cli.test_main import Job, call, job  # noqa: F401

URI = "http://alice:SECRET@127.0.0.1:9"
CLEAN = ("http://127.0.0.1:9", "alice", "SECRET")


@pytest.fixture
def seen(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:  # noqa: F811
    """What each job is given: URI, user, password."""
    for name in (USERNAME, PASSWORD, TOKEN):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "conf" / "tracking").mkdir(parents=True)
    for name, uri in (("ours", URI), ("local", "null")):
        (tmp_path / "conf" / "tracking" / f"{name}.yaml").write_text(f"enabled: false\nuri: {uri}\n")
    (tmp_path / "conf" / "own.yaml").write_text(f"defaults: [config, _self_]\ntracking: {{uri: '{URI}'}}\n")
    found: list[Any] = []
    job.action = lambda config: found.append((config.tracking.uri, os.environ.get(USERNAME), os.environ.get(PASSWORD)))
    return found


def nothing_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    files = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
    told = capsys.readouterr()
    assert len(files) >= 6 and not [path for path in files if b"SECRET" in path.read_bytes()]
    return "SECRET" not in told.out + told.err


@pytest.mark.parametrize(
    "arguments",
    [
        [f"tracking.uri={URI}"],
        [f"++tracking.uri='{URI}'"],
        ["--config-dir=conf", "tracking=ours"],
        ["--config-dir=conf", "--config-name=own"],
        ["tracking.uri=${oc.env:OUR_URI}"],
        ["-m", f"tracking.uri={URI}", "tracking.enabled=false", "seed=1,2"],
        pytest.param(["-m", "--config-dir=conf", "tracking=ours", "seed=1,2"], marks=pytest.mark.slow),
        ["-m", "--config-dir=conf", "tracking=ours,local"],
    ],
    ids=lambda arguments: " ".join(arguments).replace(":SECRET", ""),
)
def test_the_job_has_the_credentials_and_no_file_does(
    arguments: list[str],
    seen: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OUR_URI", URI)
    assert call(monkeypatch, *arguments) == 0, capsys.readouterr().err
    assert seen[0] == CLEAN and nothing_told(tmp_path, capsys)
    assert seen[1:] == ([] if "-m" not in arguments else [CLEAN] if "seed=1,2" in arguments else [(None, None, None)])


def test_an_interrupted_run_is_found_with_another_password(
    job: Job,  # noqa: F811
    seen: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(config: Any) -> None:
        raise KeyboardInterrupt(URI)

    action, job.action = job.action, interrupt
    assert call(monkeypatch, f"tracking.uri={URI}") == 130
    job.action = action
    assert call(monkeypatch, f"tracking.uri={URI.replace('SECRET', 'other')}") == 0
    assert job.folders[0] == job.folders[1] and nothing_told(tmp_path, capsys)
    job.action = interrupt
    assert call(monkeypatch, "--config-dir=conf", "tracking=ours") == 130
    job.action = action
    assert call(monkeypatch, "--config-dir=conf", "tracking=ours") == 0
    assert job.folders[2] == job.folders[3] != job.folders[0] and nothing_told(tmp_path, capsys)


def test_a_traceback_and_a_mistake_are_told_without_them(
    job: Job,  # noqa: F811
    seen: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(config: Any) -> None:
        raise RuntimeError(f"cannot reach {URI} or postgresql://bob:SECRET@host/db")

    job.action = fail
    assert call(monkeypatch, f"tracking.uri={URI}") == 1
    log = (job.folders[0] / "bnre_exp.log").read_text()
    assert "Traceback" in log and "http://***@127.0.0.1:9" in log and "postgresql://bob:***@host/db" in log
    assert nothing_told(tmp_path, capsys)
    for argument in (f"trakcing.uri={URI}", "tracking.uri=http://alice:SE/CRET@h", f"tracking.experiment=[{URI}"):
        assert call(monkeypatch, argument) == 2
        told = capsys.readouterr().err
        assert "SECRET" not in told and "SE/CRET" not in told
    assert call(monkeypatch, "--config-dir=conf", "--config-name=own", "--cfg", "job") == 0
    told = capsys.readouterr().out
    assert "SECRET" not in told and "http://***@127.0.0.1:9" in told
