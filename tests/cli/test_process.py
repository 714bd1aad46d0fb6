"""The command line as real processes, started in another folder than the checkout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bnre_exp

ROOT = Path(bnre_exp.__file__).parent.parent


NET = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
"""
SMALL = [
    "model._target_=net.net",
    "dataset.train_limit=64",
    "dataset.test_limit=32",
    "export=checkpoint",
    "tracking=off",
]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("BNRE_OUTPUT_DIR", None)
    (folder / "net.py").write_text(NET)
    command = [sys.executable, "-m", "bnre_exp", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_process_with_a_mistake(tmp_path: Path) -> None:
    process = start(tmp_path, "quant.weight_bit=3")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.startswith("Error: quant.weight_bit:") and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-m", "seed=1,2", *SMALL], "Stopped: what read the output has closed it.\n"),
        (["--cfg=job"], ""),
        (["--help"], ""),
    ],
)
def test_process_whose_output_nobody_reads(arguments: list[str], says: str, tmp_path: Path) -> None:
    process = start(tmp_path, *arguments)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    try:
        assert process.stderr.read() == says
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()


def test_process_stopped_by_sigterm_keeps_what_is_finished(tmp_path: Path) -> None:
    process = start(tmp_path, *SMALL, "dataset.train_epochs=100000")
    deadline = time.monotonic() + 120
    try:
        metrics = "outputs/runs/*/metrics.jsonl"
        while not any('"metrics"' in file.read_text() for file in tmp_path.glob(metrics)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, error
    assert "SIGTERM" in error and "Traceback" not in error
    (run,) = tmp_path.glob("outputs/runs/*")
    assert f"What was finished is in {run}" in error
    assert (run / "config.yaml").exists() and (run / "bnre_exp.log").exists()
