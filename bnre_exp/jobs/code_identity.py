"""What a result depends on besides its configuration: source code, library versions, tensors, files."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import logging
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from bnre_exp.digests import digest, file_sha256

PACKAGE = "bnre_exp"
ROOT = Path(__file__).resolve().parents[1]  # of the package
logger = logging.getLogger(__name__)

_CHANGED: set[Path] = set()  # source files that were found changed since they were imported


def code_digest(names: Iterable[str]) -> str:
    """Digest of what files of this package say to the interpreter; comments, docstrings and layout do not count.

    names: modules, or folders with all that is in them, as dotted paths below the package.
    """
    files = {path for name in names for path in _files_of(name)}
    return digest({str(path.relative_to(ROOT)): _meaning(path) for path in sorted(files)})


def _files_of(name: str) -> list[Path]:
    """The files of a module or folder of this package. Raises ``ModuleNotFoundError`` if there is none."""
    place = ROOT.joinpath(*name.split("."))
    found = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    if not all(path.is_file() for path in found):
        raise ModuleNotFoundError(f"{PACKAGE} has no {name}")
    return found


@cache
def _meaning(path: Path) -> str:
    """Digest of a source file as this process first saw it, without what the interpreter does not run."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # no Python, or something optional that this Python cannot import either
        return file_sha256(path)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and body and _is_text(body[0]):
            node.body = body[1:]
    return digest(ast.dump(tree))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def users_code(modules: Iterable[str]) -> dict[str, str]:
    """What a user's modules consist of: digest of the source by module, version by installed library.

    Comments, docstrings and layout do not count. Modules are followed to all that they import by an ``import``
    statement. What lies in the standard library is left out (the Python version stands for it), what is installed from
    a package counts by its version.
    """
    found: dict[str, str] = {}
    for name, path in _closure(tuple(sorted(modules)), lambda name: name.partition(".")[0] != PACKAGE).items():
        if path is not None:
            found[name] = source_meaning(path)
        else:
            top = name.partition(".")[0]
            found.setdefault(top, _version_of(top))
    return found


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of installed distributions, by name."""
    return {name: _version(name) for name in distributions}


def python_version() -> str:
    """Of the interpreter, as 3.11."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


IMPORTED_AS = {"pillow": "PIL"}  # where it is not the distribution's own name


def _version(distribution: str) -> str:
    """Of a distribution, or of the one that is there in its place, such as pillow-simd or onnxruntime-gpu."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        top = IMPORTED_AS.get(distribution, distribution.replace("-", "_"))
        return _version_of(top) if top in _distributions() else "another"


def _closure(modules: tuple[str, ...], wanted: Any) -> dict[str, Path | None]:
    """Module -> source file, None for an installed package; standard library and unwanted ones are left out."""
    found: dict[str, Path | None] = {}
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in seen or not wanted(name):
            seen.add(name)
            continue
        seen.add(name)
        top, _, below = name.partition(".")
        place = _place(top)
        if place == "installed":
            found[top] = None
        elif place == "local":
            waiting += [name.rpartition(".")[0]] if below else []
            path = _source_of(name)
            if path is not None:
                found[name] = path
                waiting += sorted(_imports(path, name))
    return found


def _source_of(module: str) -> Path | None:
    """The file of a module, found without importing anything: a script that some branch imports must not run."""
    name, spec, places = "", None, None
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        try:
            spec = getattr(sys.modules.get(name), "__spec__", None)
            if spec is None:
                spec = PathFinder.find_spec(name, places) if places is not None else importlib.util.find_spec(name)
        except (ImportError, AttributeError, ValueError, KeyError):  # of a namespace that nobody imported
            return None
        if spec is None:
            return None
        places = spec.submodule_search_locations if spec.submodule_search_locations is not None else []
    origin = getattr(spec, "origin", None)
    return Path(origin).resolve() if origin and os.path.isfile(origin) else None


@cache
def _first_sha256(path: Path) -> str:
    return file_sha256(path)


def source_meaning(path: Path) -> str:
    """Digest of a source file as this process first saw it, which is how it runs here: modules are imported once."""
    if file_sha256(path) != _first_sha256(path) and path not in _CHANGED:
        _CHANGED.add(path)
        logger.warning("%s has changed since it was imported; this process goes on with it as it was.", path)
    return _meaning(path)


@cache
def _library_folders() -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    installed = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    installed |= {*site.getsitepackages(), site.getusersitepackages()}
    standard = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    return tuple(Path(p).resolve() for p in installed), tuple(Path(p).resolve() for p in standard)


@cache
def _place(top: str) -> str:
    """Where a top-level module is from: "installed" as a package, of the "standard" library, or "local"."""
    path = _source_of(top)  # a module of the user's may have the name of one of the standard library
    if top in sys.builtin_module_names or (path is None and top in sys.stdlib_module_names):
        return "standard"
    installed, standard = _library_folders()
    if path is not None and any(folder in path.parents for folder in installed):
        return "installed"
    return "standard" if path is not None and any(folder in path.parents for folder in standard) else "local"


def is_local(module: str) -> bool:
    """Whether a module is the user's own: neither installed, nor of the standard library or this package."""
    top = module.partition(".")[0]
    return top != PACKAGE and _place(top) == "local"


def _imports(path: Path, module: str) -> set[str]:
    """Names that may be modules: of ``from a import b`` both a and a.b."""
    if path.suffix != ".py":
        return set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # something optional that this Python cannot import either
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.update({base, *(f"{base}.{alias.name}" for alias in node.names)} if base else set())
    return names


def _version_of(top: str) -> str:
    names = _distributions().get(top, [])
    versions = [f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names))]
    return ", ".join(versions) or str(getattr(sys.modules.get(top), "__version__", "unknown"))


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Distributions by the top-level modules that they install, as ``importlib.metadata.packages_distributions`` tells
    them; that makes a path of each file of every distribution, which takes most of a second."""
    found: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        named, record = distribution.read_text("top_level.txt"), distribution.read_text("RECORD") or ""
        files = (line.partition(",")[0].strip('"') for line in record.splitlines())
        modules = (file.removesuffix(".py") for file in files if file.endswith(".py"))
        tops = (named or "").split() or {module.partition("/")[0] for module in modules}
        for top in tops:
            found.setdefault(top, []).append(distribution.metadata["Name"])
    return found
