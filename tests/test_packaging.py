"""What an installed wheel has: the commands, the configuration, the marker of types."""

from __future__ import annotations

import ast
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import bnre_exp

ROOT = Path(bnre_exp.__file__).parent.parent
COMMANDS = {"bnre-exp", "bnre-exp-onnx", "bnre-exp-store", "bnre-exp-sync", "bnre-exp-compare"}


def entry_points() -> dict[str, str]:
    """Command to ``module:function``, as pyproject.toml has them."""
    (section,) = re.findall(r"^\[project\.scripts\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    return dict(re.findall(r'^(\S+) = "(.+)"$', section, re.M))


def write_commands(folder: Path) -> None:
    """The commands as files, as pip makes them: their own folder comes first in their search path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, place in entry_points().items():
        module, function = place.split(":")
        text = f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as a wheel has it: unpacked from one, or copied where none can be built."""
    place = tmp_path_factory.mktemp("wheel")
    if importlib.util.find_spec("hatchling") is None:
        shutil.copytree(ROOT / "bnre_exp", place / "bnre_exp", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "conf", place / "bnre_exp" / "conf")
    else:
        build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(place), str(ROOT)]
        subprocess.run(build, check=True, capture_output=True)
        (wheel,) = place.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        (metadata,) = place.glob("*.dist-info")
        for name, target in entry_points().items():
            assert f"{name} = {target}" in (metadata / "entry_points.txt").read_text()
    return place


def test_commands_name_functions_that_exist() -> None:
    assert entry_points().keys() == COMMANDS
    assert all(callable(pkgutil.resolve_name(target)) for target in entry_points().values())


def test_the_package_says_its_version() -> None:
    assert isinstance(bnre_exp.__version__, str) and bnre_exp.__version__


def test_every_public_name_is_imported_when_it_is_used() -> None:
    """At run time from the place that type checkers see it come from; nothing else passes for a name."""
    tree = ast.parse(Path(bnre_exp.__file__).read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in nodes for alias in node.names if "bnre_exp." in str(node.module)}
    assert sorted({*seen, "__version__"}) == sorted(bnre_exp.__all__) and set(bnre_exp.__all__) <= set(dir(bnre_exp))
    for name, module in seen.items():
        assert getattr(bnre_exp, name) is getattr(import_module(str(module)), name)
    assert bnre_exp.quantsim.sim.sim_report is bnre_exp.sim_report  # as before, by the import of the package alone
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        bnre_exp.quantise  # noqa: B018
    with pytest.raises(ImportError):
        exec("from bnre_exp import quantise")


def test_a_wheel_has_configuration_and_types(installed: Path) -> None:
    package = installed / "bnre_exp"
    assert (package / "py.typed").exists()
    inside = {str(file.relative_to(package / "conf")) for file in (package / "conf").rglob("*.yaml")}
    assert inside == {str(file.relative_to(ROOT / "conf")) for file in (ROOT / "conf").rglob("*.yaml")}


NET = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
"""


def test_the_installed_command_finds_its_configuration(installed: Path, tmp_path: Path) -> None:
    write_commands(installed / "bin")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [str(installed / "bin" / "bnre-exp"), "quant=w3", "--cfg", "job"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "weight_bits: 3\n" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_installed_command_finds_the_users_network(installed: Path, tmp_path: Path) -> None:
    """As ``python -m bnre_exp`` does, which has the working directory in its search path."""
    write_commands(installed / "bin")
    (tmp_path / "mynet.py").write_text(NET)
    done = subprocess.run(
        [str(installed / "bin" / "bnre-exp"), "model=custom", "model._target_=mynet.net", "dataset.train_limit=96",
         "dataset.test_limit=16", "dataset.batch_size=16", "train.epochs=1", "qat=off", "reest.num_batches=2",
         "quant.calib_batches=1", "tracking=off"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed), "BNRE_OUTPUT_DIR": "results"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "results" / "runs").iterdir()
    assert (run / "model.onnx").exists() and (run / "folded").is_dir() and not (tmp_path / "outputs").exists()


IMPORTING_TORCH = "bnre-exp-onnx"


@pytest.mark.parametrize(
    "command", [*sorted(COMMANDS - {IMPORTING_TORCH}), pytest.param(IMPORTING_TORCH, marks=pytest.mark.slow)]
)
def test_commands_have_help_under_their_name(command: str, installed: Path, tmp_path: Path) -> None:
    write_commands(installed / "bin")
    done = subprocess.run(
        [str(installed / "bin" / command), "--help"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert command in done.stdout and "scripts/" not in done.stdout
