"""Imports point one way (DESIGN.md, section 2), and what a library user imports stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bnre_exp

PACKAGE = Path(bnre_exp.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LEAVES = {"errors", "fingerprint", "progress"}
DATA_AND_MODELS = {
    "batches",
    "convert",
    "data",
    "datasets",
    "models",
    "preprocess",
    "splits",
    "targets",
    "weights",
    "zoo",
}

# What the files of a part may import of the package, by the first name below bnre_exp; a part may import itself.
ALLOWED = {
    "errors": set(),
    "progress": set(),
    "fingerprint": set(),
    "filesystems": set(),
    "journal": set(),
    "runs": {"errors"},
    "store": {"fingerprint"},
    "quantsim": {"errors"},
    "stages": {"quantsim"} | LEAVES,
    "ort": {"errors"},
    "export": {"quantsim", "stages", "ort"} | LEAVES,
    "onnx": {"quantsim", "stages", "ort", "report"} | DATA_AND_MODELS | LEAVES,
    "report": {"quantsim"} | LEAVES,
    "config": {"errors"},
    "help": {"config"},
    "mistakes": {"config", "errors"},
    "provenance": set(),
    "typed_text": set(),
    "tracking": {"errors", "filesystems", "journal", "ort", "provenance", "typed_text"},
    **{name: DATA_AND_MODELS | LEAVES | {"ort"} for name in DATA_AND_MODELS},
    "steps": {"config", "quantsim", "stages", "export", "ort", "report"} | DATA_AND_MODELS | LEAVES,
    "plan": {"config", "stages", "steps"} | DATA_AND_MODELS | LEAVES,
    "job": {"config", "plan", "quantsim", "report", "provenance", "stages", "steps", "store", "tracking"}
    | DATA_AND_MODELS
    | LEAVES,
    "pipeline": {"config", "errors", "job", "plan", "report", "provenance", "steps", "store", "tracking"},
    "sweep": {"config", "errors", "journal", "provenance", "report", "runs", "tracking"},
    "__init__": {"quantsim", "stages", "export", "errors"},
    "__main__": {
        "config",
        "errors",
        "fingerprint",
        "help",
        "journal",
        "mistakes",
        "pipeline",
        "plan",
        "report",
        "runs",
        "sweep",
    },
}


def imported(source: str) -> set[str]:
    """Dotted names that a file imports anywhere in it; ``from a import b`` gives a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this package"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_file_belongs_to_a_known_part() -> None:
    assert {part_of(file) for file in FILES} == set(ALLOWED)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    names = imported(file.read_text())
    parts = {name.split(".")[1] for name in names if name.startswith("bnre_exp.")}
    # `from bnre_exp import fold_batch_norms` in the package would hide where it comes from
    assert "bnre_exp" not in names
    assert parts <= ALLOWED[part_of(file)] | {part_of(file)}


def files_importing(library: str) -> set[str]:
    return {
        part_of(file) for file in FILES if any(name.split(".")[0] == library for name in imported(file.read_text()))
    }


def test_hydra_and_mlflow_are_imported_in_one_file_each() -> None:
    assert files_importing("hydra") == {"__main__"}
    assert files_importing("mlflow") == {"tracking"}


@pytest.mark.parametrize("part", ["quantsim", "stages", "steps", "export", "report", "store"])
def test_algorithms_know_no_configuration_library(part: str) -> None:
    assert part not in files_importing("omegaconf")


@pytest.mark.parametrize("module", ["bnre_exp", "bnre_exp.pipeline"])
def test_importing_does_not_import_what_is_heavy(module: str, tmp_path: Path) -> None:
    heavy = "{'hydra', 'mlflow', 'onnx', 'onnxruntime', 'onnxscript'}"
    code = f"import sys, {module}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    search = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=search)
    assert done.returncode == 0, done.stderr
