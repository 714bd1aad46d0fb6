"""A run's own record of all that it logs, ``metrics.jsonl``: written and on disk before MLflow hears of it.

One JSON object a line, each with ``time`` (seconds since 1970) and one of ``run`` (what the run is), ``params``,
``metrics`` (with ``step``), ``tags``, ``dataset``, ``artifact``, ``table``, ``model``, ``view`` and ``status``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bnre_exp.credentials import concealed

logger = logging.getLogger(__name__)

NAME = "metrics.jsonl"
LOGGED_ONCE = ("run", "params", "metrics", "tags", "dataset")  # a record like one that is there adds nothing


class Journal:
    """The records of one run, in order. Use as a context manager; opening an existing one goes on with it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        # Unbuffered: after a failed write nothing is left over that closing the file would try to write again.
        self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115
        self.folder = folder
        content = path.read_bytes() if path.is_file() else b""
        self.records, damaged = _parse(content)
        if content and not content.endswith(b"\n"):  # killed in the middle of a line
            self._file.truncate(content.rfind(b"\n") + 1)
        if damaged:
            copy = folder / f"{NAME}.damaged"
            copy.write_bytes(content)
            logger.warning("%d lines of %s are damaged and left out; %s is a copy.", damaged, path, copy)
        self._known = {_content(record) for record in self.records}

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, kind: str, value: Any, **more: Any) -> bool:
        """Append a record; False if nothing was added because the same is there. Raises ``OSError`` if the disk does
        not take it; the file is then as before. What is a credential in a URL is not kept."""
        record = {"time": time.time(), **concealed(more), kind: concealed(value)}
        if kind in LOGGED_ONCE and _content(record) in self._known:
            return False
        line, start = _line(record), self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):  # half a line would spoil the next one
                self._file.truncate(start)
            raise
        self.records.append(record)
        self._known.add(_content(record))
        return True


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's folder, none if there are none; lines that are damaged or cut short are left out."""
    try:
        return _parse((folder / NAME).read_bytes())[0]
    except OSError:
        return []


def _parse(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records, and how many whole lines hold none."""
    records: list[dict[str, Any]] = []
    damaged = 0
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            damaged += line.endswith(b"\n")
    return records, damaged


def all_tags(records: list[dict[str, Any]]) -> dict[str, str]:
    """All tags that were set, the last value of each."""
    found: dict[str, str] = {}
    for record in records:
        found.update(record.get("tags", {}))
    return found


def last_metrics(records: list[dict[str, Any]]) -> dict[str, float]:
    """The last value of every metric, as MLflow shows it."""
    found: dict[str, tuple[float, float]] = {}
    for record in records:
        for name, value in record.get("metrics", {}).items():
            if name not in found or record.get("step", 0) >= found[name][0]:
                found[name] = record.get("step", 0), float(value)
    return {name: value for name, (_, value) in found.items()}


def curves(records: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """The values of metrics by step, of those that have steps beyond 0, in the order of the steps; the last value of
    each step counts."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if record.get("step", 0) > 0:
            for name, value in record.get("metrics", {}).items():
                found.setdefault(name, {})[record["step"]] = float(value)
    return {name: dict(sorted(values.items())) for name, values in found.items()}


def json_numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """Numbers as strict JSON holds them: those that are not finite as text."""
    return {name: float(v) if math.isfinite(v) else str(float(v)) for name, v in values.items()}


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _content(record: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in record.items() if key != "time"}, sort_keys=True)
