"""Results of stages on disk, found again by what they depend on: computed once, whole or not at all, checked when read.

Layout of the store's folder: ``entries/STAGE-KEY/`` (``entry.json`` and the files of one result), ``locks/`` (one job
computes, others wait), ``pins/`` (which results running jobs need), ``partial/STAGE-KEY/`` (of unfinished work),
``damaged/`` (set aside), ``tmp/``. Locks are those of the file system, so they hold across processes and hosts and end
with the process that held them, however it died.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from bnre_exp.digests import digest, file_sha256
from bnre_exp.files import replacing

FORMAT = 1
ENTRY = "entry.json"
STALE = 24 * 3600.0  # seconds after which what a killed process left in tmp/ is removed
POLL = 0.2  # seconds between two looks at a lock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One result. depends: all that its key is made of; config: the settings it depends on, by the name the user types;
    upstream: SHA-256 of what it was computed from; files: name -> sha256 and bytes; created, used: seconds since 1970.
    """

    folder: Path
    stage: str
    key: str
    depends: Mapping[str, Any]
    config: Mapping[str, Any]
    upstream: str | None
    files: Mapping[str, Mapping[str, Any]]
    created: float
    used: float

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(int(file["bytes"]) for file in self.files.values())


class Slot:
    """A place for one result, held by this process alone while the ``with`` block of :meth:`Store.stage` lasts.

    entry: the result, if it is there. partial: folder where work that is not finished keeps its state (None without a
    store); it is removed once the result is written.
    """

    def __init__(self, entry: Entry | None, partial: Path | None, write: Callable[..., Entry | None]) -> None:
        self.entry, self.partial, self._write = entry, partial, write

    def write(self, config: Mapping[str, Any], fill: Callable[[Path], None]) -> Entry | None:
        """Keep the files that ``fill(folder)`` writes; returns None, with a warning logged, if the disk refuses."""
        self.entry = self._write(config, fill)
        return self.entry


class Store:
    """Stage results below ``folder``, at most about ``max_bytes`` of them.

    mode: "reuse"; "refresh", which takes no entry older than ``since`` (seconds since 1970); "off", which keeps
    nothing. Use it as a context manager: until it ends, no other process evicts an entry that it has found or written.
    """

    def __init__(self, folder: Path, *, mode: str = "reuse", max_bytes: float = 20e9, since: float = 0.0) -> None:
        self.folder, self.mode, self.max_bytes, self.since = folder, mode, max_bytes, since
        self._pins = ExitStack()
        self._used: list[Entry] = []

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: Any) -> None:
        for entry in reversed(self._used):  # the first stages, which cost most, are to be evicted last
            with suppress(OSError):
                os.utime(entry.folder / ENTRY)
        self._pins.close()

    @contextmanager
    def stage(
        self,
        stage: str,
        depends: Mapping[str, Any],
        on_wait: Callable[[str], None] = lambda who: None,
        upstream: str | None = None,
    ) -> Iterator[Slot]:
        """The place of the result of ``stage`` that depends on ``depends``; waits while another process holds it.

        ``on_wait(who)`` is called once if it must wait; ``who`` says where the other process runs. ``upstream``:
        SHA-256 of what this stage starts from. A result that was computed from something else is not found: a stage
        that was lost and computed again on another machine may differ in its last bits.
        """
        if self.mode == "off":
            yield Slot(None, None, lambda config, fill: None)
            return
        key = digest(depends)
        with self._lock(stage, key, on_wait):
            entry = self._find(stage, key, upstream)
            if entry is not None:
                self._pin(entry)
            partial = self.folder / "partial" / f"{stage}-{key}"
            if self.mode == "refresh" and _newest(partial) < self.since:
                self._remove(partial)

            def write(config: Mapping[str, Any], fill: Callable[[Path], None]) -> Entry | None:
                return self._write(stage, key, depends, config, upstream, fill)

            yield Slot(entry, partial, write)

    def has(self, stage: str, depends: Mapping[str, Any]) -> bool:
        """Whether there seems to be a result, without a look at its files."""
        key = digest(depends)
        entry = None if self.mode == "off" else _read(self.folder / "entries" / f"{stage}-{key}")
        return entry is not None and not self._is_too_old(entry)

    @contextmanager
    def _lock(self, stage: str, key: str, on_wait: Callable[[str], None]) -> Iterator[None]:
        path = self.folder / "locks" / f"{stage}-{key}.lock"
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

    def _is_too_old(self, entry: Entry) -> bool:
        return self.mode == "refresh" and entry.created < self.since

    def _find(self, stage: str, key: str, upstream: str | None) -> Entry | None:
        folder = self.folder / "entries" / f"{stage}-{key}"
        if not folder.exists():
            return None
        entry = _read(folder)
        problem = "its entry.json is damaged" if entry is None else _problem(entry)
        if entry is None or problem:
            aside = self.folder / "damaged" / f"{folder.name}-{uuid.uuid4().hex[:8]}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder, aside)
            logger.warning(
                "The stored result of %s is damaged (%s); it is computed anew. See %s", stage, problem, aside
            )
            return None
        if self._is_too_old(entry) or entry.upstream != upstream:
            return None
        with suppress(OSError):
            os.utime(folder / ENTRY)  # the time of its last use
        return entry

    def _write(
        self,
        stage: str,
        key: str,
        depends: Mapping[str, Any],
        config: Mapping[str, Any],
        upstream: str | None,
        fill: Callable[[Path], None],
    ) -> Entry | None:
        target = self.folder / "entries" / f"{stage}-{key}"
        try:
            with replacing(target, durable=True, within=self.folder / "tmp") as new:
                new.mkdir()
                fill(new)
                paths = sorted(path for path in new.rglob("*") if path.is_file())
                files = {str(p.relative_to(new)): {"sha256": file_sha256(p), "bytes": p.stat().st_size} for p in paths}
                record = {
                    "format": FORMAT, "stage": stage, "key": key, "created": time.time(), "host": socket.gethostname(),
                    "config": dict(config), "depends": dict(depends), "upstream": upstream, "files": files,
                }  # fmt: skip
                (new / ENTRY).write_text(json.dumps({**record, "sha256": digest(record)}, indent=1))
        except (OSError, SafetensorError) as error:
            logger.warning("The result of %s cannot be kept in the store %s: %s.", stage, self.folder, error)
            return None
        self._remove(self.folder / "partial" / target.name)
        entry = _read(target)
        if entry is not None:
            self._pin(entry)
        with suppress(OSError):  # housekeeping never ends a job
            self.evict()
        return entry

    def _pin(self, entry: Entry) -> None:
        self._used.append(entry)
        path = self.folder / "pins" / entry.folder.name / f"{uuid.uuid4().hex}.lock"
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            lock.acquire(timeout=0)
            self._pins.callback(_unpin, lock, path)

    def _remove(self, folder: Path) -> None:
        """Remove a folder so that nobody ever sees a part of it."""
        aside = self.folder / "tmp" / f"{uuid.uuid4().hex}-old"
        aside.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.replace(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """All intact-looking entries, the least recently used first (their files are not looked at)."""
        folders = self.folder.joinpath("entries")
        found = [_read(folder) for folder in folders.iterdir()] if folders.is_dir() else []
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.used)

    def evict(self, max_bytes: float | None = None, older_than: float = 0.0) -> list[Entry]:
        """Remove what was used least recently, results and unfinished work, until the store fits ``max_bytes``
        (default: its own limit), and all last used before ``older_than`` (seconds since 1970). What a running job uses
        stays. Returns the removed results."""
        limit, removed = self.max_bytes if max_bytes is None else max_bytes, []
        found: list[tuple[float, Path, int, Entry | None]] = []
        found += [(entry.used, entry.folder, entry.size, entry) for entry in self.entries()]
        partial = self.folder / "partial"
        for folder in partial.iterdir() if partial.is_dir() else []:
            found.append((_newest(folder), folder, _size(folder), None))
        total = sum(size for _, _, size, _ in found)
        for used, folder, size, entry in sorted(found, key=lambda item: item[0]):
            if (total > limit or used < older_than) and self._remove_unless_used(folder):
                total -= size
                removed += [entry] if entry is not None else []
        self._sweep_tmp()
        return removed

    def remove_damaged(self) -> int:
        """Remove what was set aside as damaged; returns how many entries."""
        folder = self.folder / "damaged"
        count = len(list(folder.iterdir())) if folder.is_dir() else 0
        shutil.rmtree(folder, ignore_errors=True)
        return count

    def _remove_unless_used(self, folder: Path) -> bool:
        lock = FileLock(self.folder / "locks" / f"{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            if folder.parent.name == "entries" and _is_pinned(self.folder / "pins" / folder.name):
                return False
            self._remove(folder)
            return True
        finally:
            lock.release()

    def _sweep_tmp(self) -> None:
        folder = self.folder / "tmp"
        for left in folder.iterdir() if folder.is_dir() else []:
            with suppress(OSError):
                if left.stat().st_mtime < time.time() - STALE:
                    shutil.rmtree(left, ignore_errors=True)


def _who_holds(holder: Path) -> str:
    try:
        record = json.loads(holder.read_text())
        minutes = (time.time() - record["since"]) / 60
        return f"process {record['pid']} on {record['host']}, for {minutes:.0f} min now"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _read(folder: Path) -> Entry | None:
    """The entry as its entry.json describes it; None if that is missing, cut short or changed."""
    try:
        record = json.loads((folder / ENTRY).read_bytes())
        seal = record.pop("sha256")
        if record["format"] != FORMAT or seal != digest(record):
            return None
        used = (folder / ENTRY).stat().st_mtime
        names = ("stage", "key", "depends", "config", "upstream", "files", "created")
        return Entry(folder, used=used, **{name: record[name] for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _problem(entry: Entry) -> str | None:
    for name, expected in entry.files.items():
        try:
            if file_sha256(entry.folder / name) != expected["sha256"]:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


def _unpin(lock: FileLock, path: Path) -> None:
    with suppress(OSError):
        lock.release()
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def _is_pinned(folder: Path) -> bool:
    """Whether a living process needs an entry; pins of dead ones are removed."""
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


def _newest(folder: Path) -> float:
    """When the newest file in a folder was written; now, if there is none."""
    times = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times, default=time.time())


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
