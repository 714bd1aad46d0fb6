"""Locks and pins of the stage store: one job computes a result while others wait; what a running job needs stays.

They are those of the file system, so they hold across processes and hosts and end with the process that held them,
however it died.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

POLL = 0.2  # seconds between two looks at a lock


@contextmanager
def held(store: Path, name: str, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the result ``name`` of a store's folder alone; waits while another does, after ``on_wait(who)``."""
    path = store / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(path, poll_interval=POLL), path.with_suffix(".json")
    try:
        lock.acquire(timeout=0.5)  # one that makes room holds it for a moment
    except Timeout:
        on_wait(_who_holds(holder))
        lock.acquire()
    try:
        with suppress(OSError):
            holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}))
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


@contextmanager
def held_if_free(path: Path) -> Iterator[bool]:
    """True if nobody holds the lock of a file; then nobody else does while the block lasts."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def pin(store: Path, name: str, until: ExitStack) -> None:
    """Keep the result ``name`` from being evicted until the stack is closed."""
    path = store / "pins" / name / f"{uuid.uuid4().hex}.lock"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(timeout=0)
        until.callback(_unpin, lock, path)


def is_pinned(store: Path, name: str) -> bool:
    """Whether a living process needs the result ``name``; pins of dead ones are removed."""
    folder = store / "pins" / name
    for path in folder.glob("*.lock") if folder.is_dir() else []:
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        path.unlink(missing_ok=True)
        lock.release()
    with suppress(OSError):
        folder.rmdir()
    return False


def _unpin(lock: FileLock, path: Path) -> None:
    with suppress(OSError):
        lock.release()
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def _who_holds(holder: Path) -> str:
    try:
        record = json.loads(holder.read_text())
        minutes = (time.time() - record["since"]) / 60
        return f"process {record['pid']} on {record['host']}, for {minutes:.0f} min now"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
