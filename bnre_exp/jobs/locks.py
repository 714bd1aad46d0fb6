"""Locks and pins of the stage store: one job computes a result while others wait; what a running job needs stays.

They are those of the file system, so they hold across processes and hosts and end with the process that held them,
however it died.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bnre_exp.files import held_if_free, is_stale, lock_file, unlock
from bnre_exp.jobs.entries import ENTRY


@contextmanager
def held(store: Path, name: str, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the result ``name`` of a store's folder alone; waits while another does, after ``on_wait(who)``. Raises
    ``OSError`` where its lock cannot be opened."""
    path = store / "locks" / f"{name}.lock"
    holder, lock = path.with_suffix(".json"), lock_file(path, until=0.5)  # one that makes room holds it for a moment
    if lock is None:
        on_wait(_who_holds(holder))
        lock = lock_file(path, until=None)
    try:
        with suppress(OSError):
            holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}))
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        if lock is not None:
            unlock(lock)


def pin(entry: Path, until: ExitStack) -> bool:
    """Keep an entry's folder from being evicted until the stack is closed; one who may only read it can, too. Returns
    whether it is still there."""
    try:
        lock = lock_file(entry / ENTRY, shared=True, create=False, until=5)
    except OSError:
        return (entry / ENTRY).exists()
    if lock is not None:
        until.callback(unlock, lock)
    return True


@contextmanager
def free(store: Path, name: str) -> Iterator[bool]:
    """True if nobody computes or needs the result ``name``; then nobody begins to while the block lasts."""
    entry = store / "entries" / name / ENTRY
    with held_if_free(store / "locks" / f"{name}.lock") as is_free, held_if_free(entry, create=False) as is_unpinned:
        yield is_free and (is_unpinned or not entry.exists())


def sweep_locks(store: Path) -> None:
    """Remove locks of results that are not there any more, what dead processes said of themselves, and what earlier
    versions left as pins."""
    for path in (store / "locks").glob("*.lock"):
        holder, places = path.with_suffix(".json"), [store / part / path.stem for part in ("entries", "partial")]
        is_needed = any(place.exists() for place in places)
        if (is_needed and not holder.exists()) or _is_elsewhere(holder):
            continue
        with held_if_free(path, create=False) as is_free, suppress(OSError):
            if is_free:
                holder.unlink(missing_ok=True)
                if not is_needed:
                    path.unlink()
    for path in (store / "pins").glob("*/*.lock"):
        with held_if_free(path, create=False) as is_free, suppress(OSError):
            if is_free:
                path.unlink()
    for folder in [*(store / "pins").glob("*"), store / "pins"]:
        with suppress(OSError):
            folder.rmdir()


def _is_elsewhere(holder: Path) -> bool:
    """Whether another host, whose locks may not be seen here, has held a result within a day."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return bool(json.loads(holder.read_text())["host"] != socket.gethostname() and not is_stale(holder))
    return False


def _who_holds(holder: Path) -> str:
    try:
        record = json.loads(holder.read_text())
        minutes = (time.time() - record["since"]) / 60
        return f"process {record['pid']} on {record['host']}, for {minutes:.0f} min now"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
