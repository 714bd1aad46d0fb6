"""How commands start: what they import, and how Ctrl-C and SIGTERM end them from the first moment on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bnre_exp
from bnre_exp.cli.launch import stops_raise
from bnre_exp.errors import Terminated

ROOT = Path(bnre_exp.__file__).parent.parent
LIGHT = [
    ["--help"], ["--version"], ["-sc", "install=bash"], ["quant.weight_bit=3"], ["quant.weight_bits=1"],
    ["train.epochs=1e21"], ["model=resnet19"], ["model=custom"], ["~quant"], ["resnet18"], ["qat.lr=nan", "seed=1"],
]  # fmt: skip


def start(code: str, *search: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*search, ROOT]))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=120)


def test_neither_help_nor_a_mistake_imports_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from bnre_exp.cli.launch import compare, main, sync
for arguments in {LIGHT!r}:
    sys.argv = ["bnre-exp", *arguments]
    status = main()
    heavy = {{"torch", "torchvision", "mlflow", "onnx", "matplotlib", "numpy"}} & set(sys.modules)
    if heavy or status != (0 if arguments[0].startswith("-") else 2):
        sys.exit(f"{{arguments}}: {{status}}, {{heavy}}")
for command in (compare, sync):
    sys.argv = ["command", "--help"]
    try:
        command()
    except SystemExit:
        assert "torch" not in sys.modules, command
"""
    done = start(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "outputs" / "runs").exists()


@pytest.mark.parametrize(
    ("entry", "number", "says"),
    [("main", signal.SIGINT, "Interrupted (Ctrl-C).\n"), ("sync", signal.SIGTERM, "Stopped by SIGTERM.\n")],
)
def test_a_signal_while_libraries_are_imported_ends_the_command_by_one_line(
    entry: str, number: signal.Signals, says: str, tmp_path: Path
) -> None:
    """Also where a library would swallow the exception, or make another one of it."""
    (tmp_path / "rich").mkdir()
    lines = ["import os", "try:", f"    os.kill(os.getpid(), {int(number)})", "    [None for _ in range(10**6)]"]
    text = "\n".join([*lines, "except BaseException:", "    pass", "raise AttributeError('half a library')"])
    (tmp_path / "rich" / "__init__.py").write_text(text)
    done = start(f"import sys; from bnre_exp.cli.launch import {entry}; sys.exit({entry}())", tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (128 + number, says)


def test_ui_has_a_command_of_its_own(tmp_path: Path) -> None:
    """Only as the very first word; what follows it are its arguments."""
    package = tmp_path / "bnre_exp" / "cli"
    package.mkdir(parents=True)
    for file in ("__init__.py", "errors.py", "cli/__init__.py", "cli/launch.py"):
        (tmp_path / "bnre_exp" / file).write_text((ROOT / "bnre_exp" / file).read_text())
    (package / "ui.py").write_text("def main(arguments):\n    print('ui', arguments)\n    return 7\n")
    (package / "main.py").write_text("def main():\n    print('main')\n    return 0\n")
    code = "import sys; from bnre_exp.cli.launch import main; sys.argv[1:] = {}; sys.exit(main())"
    done = start(code.format(["ui", "--port", "1"]), tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (7, "ui ['--port', '1']\n")
    assert start(code.format(["seed=1", "ui"]), tmp_path, cwd=tmp_path).stdout == "main\n"


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_error_that_a_library_made_of_a_signal_is_the_signal(
    number: signal.Signals, kind: type[BaseException]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(kind), stops_raise():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise AttributeError("'NoneType' object has no attribute 'x'") from None
    assert signal.getsignal(number) is before
    with pytest.raises(AttributeError), stops_raise():  # any other error stays what it is
        raise AttributeError


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """nohup and a shell's & ignore SIGINT for what they start."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stops_raise():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_python_without_the_libraries_is_told_so(tmp_path: Path) -> None:
    code = "import sys; sys.modules['rich'] = None; from bnre_exp.cli.launch import sync; sys.exit(sync())"
    done = start(code, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{sys.executable} has no rich" in done.stderr


@pytest.mark.parametrize("script", ["sync_mlflow", "store", "compare_runs.py"])
def test_scripts_use_the_environment_they_are_started_from_and_install_nothing(script: str, tmp_path: Path) -> None:
    """From a copy of the checkout that has no environment of its own."""
    for folder in ("scripts", "bnre_exp"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "bench"))
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).symlink_to("/bin/false")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "PYTHONPATH")}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable] if script.endswith(".py") else []
        command += [str(tmp_path / "scripts" / script), "--help"]
        return subprocess.run(command, env={**environment, **more}, cwd=tmp_path, capture_output=True, text=True)

    done = run(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0 and "usage: bnre-exp-" in done.stdout, done.stderr
    if not script.endswith(".py"):
        done = run(PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        assert done.returncode == 2 and done.stderr.startswith("Error: neither") and "PYTHON" in done.stderr
    assert not (tmp_path / ".venv").exists()
