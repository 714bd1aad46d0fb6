"""Shared by all tests. Those marked fashion_mnist are skipped on a machine without that data; with
BNRE_TESTS_WITHOUT_DATA=1 every machine is one."""

from __future__ import annotations

import os
import runpy
import signal
from pathlib import Path

import pytest
import torch

from bnre_exp.data.datasets import DEBIAN_FASHION_MNIST

HIDING = Path(__file__).parent / "without_data"
HAS_FASHION_MNIST = Path(DEBIAN_FASHION_MNIST).is_dir()
if os.environ.get("BNRE_TESTS_WITHOUT_DATA") == "1":
    # A test that opens the files without saying so by the marker fails, in a process that it starts too.
    HAS_FASHION_MNIST = False
    runpy.run_path(str(HIDING / "sitecustomize.py"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HIDING), os.environ.get("PYTHONPATH", "")])
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's & and nohup have what they start ignore Ctrl-C, and all that this starts; tests press it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("fashion_mnist") and not HAS_FASHION_MNIST:
        pytest.skip("needs Fashion-MNIST: apt-get install dataset-fashion-mnist")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
