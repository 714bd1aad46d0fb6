"""Room in the stage store: what was used least recently goes, what a running job needs stays."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from bnre_exp.jobs.entries import Entry, read_entry
from bnre_exp.jobs.locks import held_if_free, is_pinned

STALE = 24 * 3600.0  # seconds after which what a killed process left in tmp/ is removed


def entries_of(store: Path) -> list[Entry]:
    """All intact-looking entries of a store's folder, the least recently used first (their files are not looked at)."""
    found = [read_entry(folder) for folder in _items(store / "entries")]
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.used)


def evict(store: Path, max_bytes: float, older_than: float) -> list[Entry]:
    """Remove results and unfinished work, as :meth:`bnre_exp.jobs.store.Store.evict` says; returns the results."""
    found: list[tuple[float, Path, int, Entry | None]] = []
    found += [(entry.used, entry.folder, entry.size, entry) for entry in entries_of(store)]
    found += [(newest(folder), folder, _size(folder), None) for folder in _items(store / "partial")]
    total, removed = sum(size for _, _, size, _ in found), []
    for used, folder, size, entry in sorted(found, key=lambda item: item[0]):
        if (total > max_bytes or used < older_than) and _remove_unless_used(store, folder):
            total -= size
            removed += [entry] if entry is not None else []
    _sweep_tmp(store)
    return removed


def remove(store: Path, folder: Path) -> None:
    """Remove a folder of a store so that nobody ever sees a part of it."""
    aside = store / "tmp" / f"{uuid.uuid4().hex}-old"
    aside.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def newest(folder: Path) -> float:
    """When the newest file in a folder was written (seconds since 1970); now, if there is none."""
    times = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times, default=time.time())


def _remove_unless_used(store: Path, folder: Path) -> bool:
    with held_if_free(store / "locks" / f"{folder.name}.lock") as is_free:
        if not is_free or (folder.parent.name == "entries" and is_pinned(store, folder.name)):
            return False
        remove(store, folder)
        return True


def _sweep_tmp(store: Path) -> None:
    for left in _items(store / "tmp"):
        with suppress(OSError):
            if left.stat().st_mtime < time.time() - STALE:
                shutil.rmtree(left, ignore_errors=True)


def _items(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
