"""Files loaded in another process: what it computes, what it says when it cannot, and that nothing is left of it."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bnre_exp
from bnre_exp import UserError, evaluate
from bnre_exp.algorithms.integers import integer_simulation
from bnre_exp.export.checkpoint.save_load import save_folded
from bnre_exp.jobs.stages.reload import Verifier
from tests.export.saving import IMAGES, folded_network
from tests.networks import flat_cnn, randomize

ROOT = Path(bnre_exp.__file__).parents[1]
TEST = [(IMAGES, torch.tensor([1, 2, 3])), (IMAGES[:2].flip(3), torch.tensor([4, 5]))]


def setting_of(data: Any) -> Any:
    return SimpleNamespace(evaluate=lambda network, description, as_shipped: evaluate(network, data))


SETTING = setting_of(TEST)
NETWORK = folded_network(randomize(flat_cnn()), IMAGES)

USER_CODE = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch import nn

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x):
        return x * self.weight

class Odd(Exception):
    def __init__(self, one, two):  # cannot be unpickled
        super().__init__(one + two)

def net():
    layers = nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10), Scale(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers)

def prints():
    print("printed")
    os.system("echo from the shell; echo on standard error >&2")
    return net()

def leaves():
    os._exit(3)

def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)

def exits():
    sys.exit("enough")

def raises():
    raise Odd("such ", "words")

def hangs():
    Path("pid").write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    """A module of the user's in the working directory; ``-m`` has that first on the path."""
    (tmp_path / "user_nets.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("user_nets")
    del sys.modules["user_nets"]


def checkpoint(path: Path, builder: str | None = None) -> dict:
    model = {"target": f"user_nets.{builder}", "num_classes": 10} if builder else None
    return {"": {"format": "checkpoint", "path": str(path), "device": "cpu", "model": model}}


def has_ended(pid: int) -> bool:
    """Within a few seconds, be it as a zombie."""
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def told(reason: str) -> str:
    return f"^the ONNX model that was written cannot be loaded and run in another process: {reason}$"


FAILURES = {
    None: ".*nowhere.*",
    "raises": ".* raised Odd: such words .*user_nets.py, line .*",
    "exits": "SystemExit: enough",
}


def test_predictions_are_those_of_this_process_also_after_a_file_that_fails_and_the_child_is_silent(
    tmp_path, user_code, capfd
):
    folded = {
        "plain": folded_network(randomize(flat_cnn()), IMAGES),
        "users": folded_network(randomize(user_code.net()), IMAGES, leaf_modules=["Scale"]),
    }
    for name, network in folded.items():
        save_folded(network, tmp_path / name)
    capfd.readouterr()
    with Verifier(SETTING, NETWORK) as verifier:
        plain, known = verifier.evaluate(checkpoint(tmp_path / "plain"), "checkpoint")
        for builder, reason in FAILURES.items():
            with pytest.raises(UserError, match=told(reason)):
                verifier.evaluate(checkpoint(tmp_path / "nowhere", builder), "ONNX model")
        users, _ = verifier.evaluate(checkpoint(tmp_path / "users", "prints"), "checkpoint")
        with pytest.raises(UserError, match=told("its process ended with status 3")):
            verifier.evaluate(checkpoint(tmp_path / "nowhere", "leaves"), "ONNX model")
    assert known == {} and multiprocessing.active_children() == []
    assert capfd.readouterr() == ("", "")
    for name, found in (("plain", plain), ("users", users)):
        expected = evaluate(integer_simulation(folded[name]).eval(), TEST)
        assert torch.equal(found.predictions, expected.predictions)
        assert (found.top1, found.loss, found.count) == (expected.top1, expected.loss, 5)


@pytest.mark.slow
def test_how_the_child_was_killed_is_told(tmp_path, user_code):
    with (
        Verifier(SETTING, NETWORK) as verifier,
        pytest.raises(UserError, match=told("its process ended with status -9, Killed")),
    ):
        verifier.evaluate(checkpoint(tmp_path / "nowhere", "is_killed"), "ONNX model")
    assert multiprocessing.active_children() == []


def test_a_child_that_dies_while_it_is_sent_a_batch(tmp_path):
    save_folded(folded_network(randomize(flat_cnn()), IMAGES), tmp_path / "net")

    def loader():
        yield IMAGES, torch.zeros(3, dtype=torch.int64)
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGSTOP)
        threading.Timer(1, child.kill).start()  # the pipe is full by then
        yield torch.zeros(1, 3, 1024, 1024), torch.zeros(1, dtype=torch.int64)

    with Verifier(setting_of(loader()), NETWORK) as verifier, pytest.raises(UserError, match="status -9"):
        verifier.evaluate(checkpoint(tmp_path / "net"), "checkpoint")
    assert multiprocessing.active_children() == []


def test_an_exception_ends_a_child_that_hangs(tmp_path, user_code):
    def interrupt(*_):
        if Path("pid").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), Verifier(SETTING, NETWORK) as verifier:
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            verifier.evaluate(checkpoint(tmp_path / "nowhere", "hangs"), "checkpoint")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert multiprocessing.active_children() == [] and has_ended(int(Path("pid").read_text()))


@pytest.mark.slow
def test_a_worker_of_joblibs_can_have_the_child_too(tmp_path, monkeypatch):
    """Its start method is unknown to a process that is spawned, and it may be a daemon."""
    importlib.import_module("joblib.externals.loky")
    save_folded(folded_network(randomize(flat_cnn()), IMAGES), tmp_path / "net")
    monkeypatch.setitem(vars(multiprocessing.current_process())["_config"], "daemon", True)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("loky", force=True)
    try:
        with Verifier(SETTING, NETWORK) as verifier:
            assert multiprocessing.get_start_method() == "loky" and multiprocessing.current_process().daemon
            assert verifier.evaluate(checkpoint(tmp_path / "net"), "checkpoint")[0].count == 5
    finally:
        multiprocessing.set_start_method(before, force=True)


SCRIPT = """
import sys
from tests.jobs.stages.test_reload import NETWORK, SETTING, Path, Verifier, checkpoint
if __name__ == "__main__":
    with Verifier(SETTING, NETWORK) as verifier:
        print("started", flush=True)
        verifier.evaluate(checkpoint(Path("nowhere"), "hangs"), "checkpoint")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
@pytest.mark.parametrize("is_ready", [True, False], ids=["loading", "starting"])
def test_the_child_goes_with_its_parent(tmp_path, user_code, number, is_ready):
    """Ctrl-C goes to all processes of the terminal, also while the child still imports; SIGKILL to the parent."""
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py"], env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == "started\n"
    while is_ready and not (tmp_path / "pid").exists():
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert children and all(has_ended(int(pid)) for pid in children)
    assert errors.count("Traceback") == (number == signal.SIGINT), errors  # the parent's own, of this script


def test_the_child_imports_the_command_line_without_its_libraries():
    code = "import runpy, sys; runpy.run_module('bnre_exp.__main__', run_name='__mp_main__'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "bnre_exp" in done.stdout.split() and not {"hydra", "bnre_exp.cli"} & set(done.stdout.split())
