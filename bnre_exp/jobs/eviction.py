"""Room in the stage store: what was used least recently goes, what a running job needs stays."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from bnre_exp.files import WORK, is_stale, newest, sweep_work, work_folder
from bnre_exp.jobs.entries import Entry, read_entry
from bnre_exp.jobs.locks import free, sweep_locks


def entries_of(store: Path) -> list[Entry]:
    """All intact-looking entries of a store's folder, the least recently used first (their files are not looked at)."""
    found = [read_entry(folder) for folder in _items(store / "entries")]
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.used)


def evict(store: Path, max_bytes: float, older_than: float) -> list[Entry]:
    """Remove results and unfinished work, as :meth:`bnre_exp.jobs.store.Store.evict` says; returns the results."""
    found: list[tuple[float, Path, int, Entry | None]] = []
    for folder in [*_items(store / "entries"), *_items(store / "partial")]:
        entry = read_entry(folder) if folder.parent.name == "entries" else None
        size = _size(folder) if entry is None else entry.size
        found.append((newest(folder) if entry is None else entry.used, folder, size, entry))
    total, removed = sum(size for _, _, size, _ in found), []
    for used, folder, size, entry in sorted(found, key=lambda item: item[0]):
        if (total > max_bytes or used < older_than) and _remove_unless_used(store, folder):
            total -= size
            removed += [entry] if entry is not None else []
    return removed


def remove(store: Path, folder: Path) -> None:
    """Remove a folder of a store so that nobody ever sees a part of it."""
    if os.path.lexists(folder):
        with work_folder(store / "tmp") as work, suppress(FileNotFoundError):
            os.replace(folder, work / folder.name)


def sweep(store: Path) -> None:
    """Remove what killed processes left: unfinished entries, and what they said of themselves. Unfinished trainings
    stay, since a repeated command goes on with them."""
    sweep_work(store / "tmp")
    for left in _items(store / "tmp"):  # of earlier versions, whose owner is not known
        if not left.name.startswith(WORK) and is_stale(left):
            shutil.rmtree(left, ignore_errors=True)
    sweep_locks(store)


def _remove_unless_used(store: Path, folder: Path) -> bool:
    with free(store, folder.name) as is_free:
        if is_free:
            remove(store, folder)
        return is_free


def _items(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
