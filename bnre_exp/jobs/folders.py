"""Run folders: what runs there, whether it still does, how it ended, and whether a command goes on with it.

``run.json`` says what a folder is for; ``run.lock`` is held for as long as its process lives. The lock is the file
system's, so it tells on any host, and however a process died, whether a run is alive.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from bnre_exp.errors import UserError
from bnre_exp.files import held_if_free, lock_file, replacing, sweep_unfinished, unlock

RECORD, LOCK = "run.json", "run.lock"
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"  # as MLflow names them


@dataclass
class RunRecord:
    """What a folder is for. identity: of the command and its configuration; label: for people; status: of the last
    time it ran; error: the message it ended with; started: seconds since 1970, of the first time; best: what a search
    found."""

    identity: str
    label: str
    started: float
    status: str = RUNNING
    error: str | None = None
    exit_status: int | None = None
    best: str | None = None


def read_record(folder: Path) -> RunRecord | None:
    """The record of a folder; None where there is none, or none that can be read."""
    try:
        return RunRecord(**json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_record(folder: Path, record: RunRecord) -> None:
    """Replace the record of a folder, in one step."""
    with replacing(folder / RECORD, durable=True) as new:
        new.write_text(json.dumps(asdict(record), indent=1))


@contextmanager
def claim(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a folder as the one that runs there. If another process holds it, wait for its end after ``on_wait()``;
    without ``on_wait`` raise ``UserError``."""
    lock = lock_file(folder / LOCK, until=5)  # others look for a moment whether it is held
    if lock is None:
        if on_wait is None:
            raise UserError(f"{folder}: another process runs there. Wait for it, or name another folder.")
        on_wait()
        lock = lock_file(folder / LOCK, until=None)
    try:
        sweep_unfinished(folder)
        yield
    finally:
        if lock is not None:
            unlock(lock)


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
    """Make room for another run in a folder that holds one: what that one logged goes to a folder ``earlier-N``."""
    earlier = folder / f"earlier-{len(list(folder.glob('earlier-*'))) + 1}"
    earlier.mkdir()
    for name in ("metrics.jsonl", "mlflow.json", RECORD):
        with suppress(FileNotFoundError):
            os.replace(folder / name, earlier / name)


def held_if_dead(folder: Path) -> AbstractContextManager[bool]:
    """A block that is given True if no process runs in a folder; then none can begin to while it lasts."""
    return held_if_free(folder / LOCK)


def is_alive(folder: Path) -> bool:
    """Whether the process that runs there lives. Any number may look at once, none of them being taken for it."""
    try:
        lock = lock_file(folder / LOCK, shared=True, create=False)
    except OSError as error:  # one that cannot be opened is another user's
        return not isinstance(error, (FileNotFoundError, NotADirectoryError))
    if lock is not None:
        unlock(lock)
    return lock is None


def find_unfinished(parent: Path, identity: str) -> Path | None:
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
