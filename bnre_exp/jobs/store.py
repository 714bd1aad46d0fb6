"""Results of stages on disk, found again by what they depend on: computed once, whole or not at all, checked when read.

Layout of the store's folder: ``entries/STAGE-KEY/`` (``entry.json`` and the files of one result), ``locks/`` (one job
computes, others wait), ``partial/STAGE-KEY/`` (of unfinished work), ``damaged/`` (set aside), ``tmp/`` (what is being
written). A job that needs a result holds a shared lock of its ``entry.json``. A store that cannot be written is read.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bnre_exp.files import newest, replacing, work_folder
from bnre_exp.jobs.entries import ENTRY, Entry, damage_of, describe_entry, name_of, read_entry
from bnre_exp.jobs.eviction import entries_of, evict, remove, sweep
from bnre_exp.jobs.locks import held, pin

__all__ = ["ENTRY", "Entry", "Slot", "Store"]

logger = logging.getLogger(__name__)

PARTS = ("entries", "partial", "locks", "tmp")


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
        self._can_write: bool | None = None  # None: not tried yet

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
        that was lost and computed again on another machine may differ in its last bits. Where the store cannot be
        written, a result is still found, and nothing is kept; that is told once, by a warning.
        """
        if self.mode == "off":
            yield Slot(None, None, lambda config, fill: None)
            return
        name = name_of(stage, depends)
        with self._held(name, on_wait):
            entry = self._find(stage, name, upstream)
            if entry is not None and not self._use(entry):
                entry = None  # it was evicted meanwhile, which nobody can do who has to lock it
            if not self._can_write:
                yield Slot(entry, None, lambda config, fill: None)
                return
            begun = self.folder / "partial" / name
            if self.mode == "refresh" and newest(begun) < self.since:
                remove(self.folder, begun)
            yield Slot(entry, begun, partial(self._write, stage, depends, upstream))

    @contextmanager
    def _held(self, name: str, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Hold one result alone, if the store can be written; the first time, sweep up what killed jobs left there."""
        with ExitStack() as stack:
            try:
                if self._can_write is None:
                    self._prepare()
                if self._can_write:
                    stack.enter_context(held(self.folder, name, on_wait))
            except OSError as error:
                self._can_write = False
                logger.warning(
                    "The store %s cannot be written (%s): what it holds is read, and nothing is kept in it. Make it "
                    "writable to you, for a group by chmod -R g+rwX and g+s for its folders, or name another folder "
                    "(store.dir=FOLDER).", self.folder, error,
                )  # fmt: skip
            yield

    def _prepare(self) -> None:
        """Raises ``OSError`` if this user may not write there."""
        for part in PARTS:
            folder = self.folder / part
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        self._can_write = True
        with suppress(OSError):  # housekeeping never ends a job
            sweep(self.folder)

    def has(self, stage: str, depends: Mapping[str, Any]) -> bool:
        """Whether there seems to be a result, without a look at its files."""
        entry = None if self.mode == "off" else read_entry(self.folder / "entries" / name_of(stage, depends))
        return entry is not None and not self._is_too_old(entry)

    def _is_too_old(self, entry: Entry) -> bool:
        return self.mode == "refresh" and entry.created < self.since

    def _find(self, stage: str, name: str, upstream: str | None) -> Entry | None:
        folder = self.folder / "entries" / name
        if not os.path.lexists(folder):
            return None
        entry = read_entry(folder)
        problem = "its entry.json is damaged, or that of another result" if entry is None else damage_of(entry)
        if entry is None or problem:
            self._set_aside(stage, folder, str(problem))
            return None
        if self._is_too_old(entry) or entry.upstream != upstream:
            return None
        with suppress(OSError):
            os.utime(folder / ENTRY)  # the time of its last use
        return entry

    def _set_aside(self, stage: str, folder: Path, problem: str) -> None:
        aside = self.folder / "damaged" / f"{folder.name}-{uuid.uuid4().hex[:8]}"
        with suppress(OSError):
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder, aside)
            folder = aside
        logger.warning("The stored result of %s is damaged (%s); it is computed anew. See %s", stage, problem, folder)

    def _write(
        self,
        stage: str,
        depends: Mapping[str, Any],
        upstream: str | None,
        config: Mapping[str, Any],
        fill: Callable[[Path], None],
    ) -> Entry | None:
        name = name_of(stage, depends)
        target = self.folder / "entries" / name
        try:
            with work_folder(self.folder / "tmp") as work, replacing(target, durable=True, within=work) as new:
                new.mkdir()
                fill(new)
                describe_entry(new, stage, depends, config, upstream)
        except (OSError, SafetensorError) as error:
            logger.warning("The result of %s cannot be kept in the store %s: %s.", stage, self.folder, error)
            return None
        with suppress(OSError):  # another user's, begun when the store was not shared
            remove(self.folder, self.folder / "partial" / name)
        entry = read_entry(target)
        if entry is not None:
            self._use(entry)
        with suppress(OSError):  # housekeeping never ends a job
            self.evict()
        return entry

    def _use(self, entry: Entry) -> bool:
        """Keep an entry from being evicted; whether it is still there."""
        self._used.append(entry)
        return pin(entry.folder, self._pins)

    def entries(self) -> list[Entry]:
        """All intact-looking entries, the least recently used first (their files are not looked at)."""
        return entries_of(self.folder)

    def evict(self, max_bytes: float | None = None, older_than: float = 0.0) -> list[Entry]:
        """Remove what was used least recently, results and unfinished work, until the store fits ``max_bytes``
        (default: its own limit), and all last used before ``older_than`` (seconds since 1970). What a running job uses
        stays. Returns the removed results."""
        return evict(self.folder, self.max_bytes if max_bytes is None else max_bytes, older_than)

    def remove_damaged(self) -> int:
        """Remove what was set aside as damaged; returns how many entries."""
        folder = self.folder / "damaged"
        count = len(list(folder.iterdir())) if folder.is_dir() else 0
        shutil.rmtree(folder, ignore_errors=True)
        return count
