"""Imports point downwards only, room by room, and what a library user imports stays light."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnre_exp

PACKAGE = Path(bnre_exp.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top floor down: a room may import those below it.
ROOMS = [
    "cli",
    "jobs",
    "tracking",
    "export",
    "onnx",
    "report",
    "models",
    "data",
    "algorithms",
    "tasks",
    "quantsim",
    "onnx_io",
]
# Files at the top: what everyone may import, and what these may import themselves.
LEAVES: dict[str, set[str]] = {
    "errors": set(),
    "credentials": {"errors"},
    "progress": set(),
    "digests": set(),
    "files": {"errors"},
    "targets": {"errors"},
}
MOST_LINES, MOST_FUNCTION_LINES = 300, 60


@functools.cache
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


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def allowed(room: str) -> set[str]:
    if room in LEAVES:
        return LEAVES[room]
    if room == "config":  # algorithms take plain arguments: it is for the rooms that compose and run jobs
        return {"errors"}
    if room == "__main__":
        return {"cli"}
    if room == "__init__":
        return {*ROOMS[ROOMS.index("export") :], *LEAVES}
    return {*ROOMS[ROOMS.index(room) :], *LEAVES} | ({"config"} if room in ("cli", "jobs") else set())


def test_the_top_level_can_be_read_at_a_glance() -> None:
    assert {room_of(file) for file in FILES} == {*ROOMS, *LEAVES, "config", "__init__", "__main__"}
    assert len(ROOMS) <= 13


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path) -> None:
    names = imported(file.read_text())
    rooms = {name.split(".")[1] for name in names if name.startswith("bnre_exp.")}
    # `from bnre_exp import fold_batch_norms` in the package would hide where it comes from
    assert "bnre_exp" not in names
    assert rooms <= allowed(room_of(file)) | {room_of(file)}


def test_there_is_no_cycle_of_files() -> None:
    modules = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in FILES}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        body = [
            node for node in ast.parse(file.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom, ast.If))
        ]
        names = imported(ast.unparse(ast.Module(body, [])))  # not those within functions
        graph[name] = {n if n in modules else n.rpartition(".")[0] for n in names if n.startswith("bnre_exp.")} - {name}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises for a cycle


def files_importing(library: str) -> set[str]:
    return {
        room_of(file) for file in FILES if any(name.split(".")[0] == library for name in imported(file.read_text()))
    }


def test_hydra_and_mlflow_are_imported_in_one_room_each() -> None:
    assert files_importing("hydra") == {"cli"}
    assert files_importing("mlflow") == {"tracking"}
    assert files_importing("omegaconf") == {"cli"}


def test_what_is_measured_is_named_by_the_task_alone() -> None:
    naming = {room_of(file) for file in FILES if re.search(r"\btop-?1\b", file.read_text())}
    assert naming == {"tasks"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < MOST_FUNCTION_LINES, node.name


def test_every_room_says_what_is_in_it() -> None:
    folders = {file.parent for file in FILES} - {PACKAGE}
    assert not [folder for folder in folders if not ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))]


HEAVY = {"hydra", "mlflow", "onnx", "onnxruntime", "onnxscript"}
HEAVIEST = {
    "bnre_exp": {"torch", "numpy", *HEAVY},
    "bnre_exp.config": {"torch", "numpy", *HEAVY},
    "bnre_exp.quantize": HEAVY,
    "bnre_exp.jobs.run": HEAVY,
}


def test_importing_does_not_import_what_is_heavy(tmp_path: Path) -> None:
    """One after the other in one process: what an earlier one imports is no more than a later one may."""
    code = f"""
import pkgutil, sys
for module, heavy in {HEAVIEST!r}.items():
    pkgutil.resolve_name(module)
    if heavy & set(sys.modules):
        sys.exit(f"{{module}}: {{heavy & set(sys.modules)}}")
"""
    search = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=search)
    assert done.returncode == 0, done.stderr
