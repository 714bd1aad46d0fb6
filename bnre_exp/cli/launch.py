"""Where the commands start. It imports little, so that Ctrl-C and SIGTERM end a command by one line from its first
moment on, also while libraries are imported."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

from bnre_exp.errors import Terminated


def main() -> int:
    """``bnre-exp``, and ``python -m bnre_exp``."""
    if sys.argv[1:2] == ["ui"]:
        return _run("bnre_exp.cli.ui", sys.argv[2:])
    with stops_end():  # a job, or a sweep, says itself from when on it has something to close
        command = _imported("bnre_exp.cli.main")
        status = 2 if command is None else int(command())
        gc.freeze()  # the process ends: its memory goes as a whole, and none of it need be looked through before
        return status


def onnx() -> int:
    """``bnre-exp-onnx``."""
    return _run("bnre_exp.onnx.__main__")


def store() -> int:
    """``bnre-exp-store``."""
    return _run("bnre_exp.cli.store_command")


def sync() -> int:
    """``bnre-exp-sync``."""
    return _run("bnre_exp.cli.sync_mlflow")


def compare() -> int:
    """``bnre-exp-compare``."""
    return _run("bnre_exp.cli.compare_runs")


def _run(module: str, *arguments: Any) -> int:
    """Import a module and call its ``main``; returns the exit status."""
    try:
        with stops_end():
            command = _imported(module)
            with stops_raise():
                return 2 if command is None else int(command(*arguments))
    except KeyboardInterrupt as stop:
        sys.stderr.write(how_stopped(stop) + "\n")
        return stop_status(stop)


def _imported(module: str) -> Callable[..., Any] | None:
    """``main`` of a module; None, and a line that says so, where this Python lacks a library."""
    try:
        command: Callable[..., Any] = import_module(module).main
        return command
    except ModuleNotFoundError as error:
        if str(error.name).startswith("bnre_exp"):
            raise
        sys.stderr.write(
            f"Error: {sys.executable} has no {error.name}. Activate the environment that bnre_exp is installed in, or "
            "in a checkout use scripts/run, which makes one.\n"
        )
        return None


def how_stopped(stop: KeyboardInterrupt) -> str:
    """What ended a command, in a line."""
    return "Stopped by SIGTERM." if isinstance(stop, Terminated) else "Interrupted (Ctrl-C)."


def stop_status(stop: KeyboardInterrupt) -> int:
    """The exit status of a command that was stopped, as shells have it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextmanager
def stops_raise() -> Iterator[None]:
    """Ctrl-C raises ``KeyboardInterrupt`` in the block, and SIGTERM ``Terminated``: files and MLflow's run are closed.

    So does an error that a library made of it."""
    stops: list[KeyboardInterrupt] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stops.append(_stop_of(number))
        raise stops[-1]

    try:
        with _handlers(stop):
            yield
    except Exception as error:
        if stops:
            raise stops[0] from error
        raise


def stops_end() -> AbstractContextManager[None]:
    """Ctrl-C and SIGTERM end the process in the block, where nothing is to be closed. An exception in the middle of an
    import would be lost in it, or come out of it as another one."""

    def end(number: int, frame: FrameType | None) -> None:
        stop = _stop_of(number)
        os.write(2, f"{how_stopped(stop)}\n".encode())
        os._exit(stop_status(stop))

    return _handlers(end)


def _stop_of(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """A handler of SIGINT and SIGTERM for a block; a signal that is ignored, as SIGINT is below nohup, stays so."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
