"""Run folders: what runs there, whether it still does, how it ended, and whether a command goes on with it.

``run.json`` says what a folder is for; ``run.lock`` is held for as long as its process lives. The lock is the file
system's, so it tells on any host, and however a process died, whether a run is alive.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

from filelock import FileLock, Timeout

from bnre_exp.errors import UserError

RECORD, LOCK = "run.json", "run.lock"
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"  # as MLflow names them


@dataclass
class RunRecord:
    """What a folder is for. identity: of the command and its configuration; label: for people; status: of the last
    time it ran; error: the message it ended with; started: seconds since 1970, of the first time."""

    identity: str
    label: str
    started: float
    status: str = RUNNING
    error: Optional[str] = None
    exit_status: Optional[int] = None


def read_record(folder: Path) -> Optional[RunRecord]:
    """The record of a folder; None where there is none, or none that can be read."""
    try:
        return RunRecord(**json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_record(folder: Path, record: RunRecord) -> None:
    """Replace the record of a folder, in one step."""
    new = folder / f".{RECORD}.new"
    new.write_text(json.dumps(asdict(record), indent=1))
    os.replace(new, folder / RECORD)


@contextmanager
def claim(folder: Path, on_wait: Optional[Callable[[], None]] = None) -> Iterator[None]:
    """Hold a folder as the one that runs there. If another process holds it, wait for its end after ``on_wait()``;
    without ``on_wait`` raise ``UserError``."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, poll_interval=0.2)
    try:
        lock.acquire(timeout=5)  # others look for a moment whether it is held
    except Timeout as error:
        if on_wait is None:
            raise UserError(f"{folder}: another process runs there. Wait for it, or name another folder.") from error
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def recorded(folder: Path, identity: str, label: str) -> Iterator[RunRecord]:
    """Write the record of what runs in a claimed folder: at the start, and at the end as the caller left it."""
    before = read_record(folder)
    record = RunRecord(identity, label, before.started if before else time.time())
    write_record(folder, record)
    try:
        yield record
    finally:
        write_record(folder, record)


def set_aside(folder: Path) -> None:
    """Make room for another run in a folder that holds one: what that one logged is kept under another name."""
    for name in ("metrics.jsonl", "mlflow.json", RECORD):
        number = len(list(folder.glob(f"{name}.*")))
        with suppress(FileNotFoundError):
            os.replace(folder / name, folder / f"{name}.{number + 1}")


def is_alive(folder: Path) -> bool:
    """Whether the process that runs there lives."""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def find_unfinished(parent: Path, identity: str) -> Optional[Path]:
    """The newest folder in ``parent`` with this identity that was interrupted or killed and that nobody holds."""
    for folder in sorted(_folders(parent), reverse=True):
        record = read_record(folder)
        if record and record.identity == identity and record.status in (RUNNING, KILLED) and not is_alive(folder):
            return folder
    return None


def find_abandoned(parents: list[Path]) -> list[Path]:
    """Folders in ``parents`` that are RUNNING by their record, though their process is dead."""
    found = []
    for folder in [folder for parent in parents for folder in _folders(parent)]:
        record = read_record(folder)
        if record and record.status == RUNNING and not is_alive(folder):
            found.append(folder)
    return found


def _folders(parent: Path) -> list[Path]:
    return [entry for entry in parent.iterdir() if (entry / RECORD).exists()] if parent.is_dir() else []
