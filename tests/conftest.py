"""Shared by all tests. Those marked fashion_mnist are skipped on a machine without that data; with
BNRE_TESTS_WITHOUT_DATA=1 every machine is one."""

from __future__ import annotations

import copy
import functools
import gc
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bnre_exp.data.datasets import DEBIAN_FASHION_MNIST
from bnre_exp.tracking import stores

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


@pytest.fixture(autouse=True, scope="session")
def _tables_of_mlflow_are_made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow's migrations of an empty database take seconds: all databases begin as copies of this process's first."""
    first, make = tmp_path_factory.mktemp("mlflow") / "first.db", stores._make_database

    def make_from_first(database: Path, client_class: Callable[[str], Any]) -> None:
        make(database, lambda uri: shutil.copy(first, stores.database_of(uri)) if first.exists() else client_class(uri))
        if not first.exists():
            shutil.copy(database, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "_make_database", make_from_first)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _pillow_opens_pictures() -> None:
    """Also after another test has imported Ultralytics, which puts a function of its own there."""
    if patches := sys.modules.get("ultralytics.utils.patches"):
        Image.open = patches._image_open


@pytest.fixture(autouse=True, scope="session")
def _operations_of_onnx_are_listed_once() -> Iterator[None]:
    """torch's exporter lists all that it can express in ONNX at each export, which takes longer than a small network
    does. The lists are the same each time."""
    import torch._export.utils as export_utils
    from torch.onnx._internal.exporter import _registration

    kind = _registration.ONNXRegistry
    listed = functools.cache(kind.from_torchlib)

    def copied(opset_version: int = kind().opset_version) -> _registration.ONNXRegistry:
        registry = copy.copy(listed(opset_version))
        registry.functions = {name: [*functions] for name, functions in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "from_torchlib", staticmethod(copied))
        patch.setattr(export_utils, "_materialize_cpp_cia_ops", functools.cache(export_utils._materialize_cpp_cia_ops))
        yield


@pytest.fixture(autouse=True, scope="module")
def _what_stays_is_not_searched_for_garbage() -> None:
    """Every full collection would go through the million objects of the libraries."""
    gc.collect()
    gc.freeze()
