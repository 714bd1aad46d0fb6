"""One stored result: its files, and ``entry.json``, which says what they are and tells when one has changed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnre_exp.digests import digest, file_sha256

FORMAT = 1
ENTRY = "entry.json"


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


def describe_entry(
    folder: Path, stage: str, depends: Mapping[str, Any], config: Mapping[str, Any], upstream: str | None
) -> None:
    """Write the entry.json of the files in ``folder``."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(p.relative_to(folder)): {"sha256": file_sha256(p), "bytes": p.stat().st_size} for p in paths}
    record = {
        "format": FORMAT, "stage": stage, "key": digest(depends), "created": time.time(),
        "host": socket.gethostname(), "config": dict(config), "depends": dict(depends), "upstream": upstream,
        "files": files,
    }  # fmt: skip
    (folder / ENTRY).write_text(json.dumps({**record, "sha256": digest(record)}, indent=1))


def read_entry(folder: Path) -> Entry | None:
    """The entry as its entry.json describes it; None if that is missing, cut short or changed, or is that of another
    key than the folder's name says."""
    try:
        record = json.loads((folder / ENTRY).read_bytes())
        seal = record.pop("sha256")
        if record["format"] != FORMAT or seal != digest(record):
            return None
        if name_of(record["stage"], record["depends"]) != folder.name:
            return None
        used = (folder / ENTRY).stat().st_mtime
        names = ("stage", "key", "depends", "config", "upstream", "files", "created")
        return Entry(folder, used=used, **{name: record[name] for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def name_of(stage: str, depends: Mapping[str, Any]) -> str:
    """The name of the folder of a result, which is its key."""
    return f"{stage}-{digest(depends)}"


def damage_of(entry: Entry) -> str | None:
    """What is wrong with the files of an entry, in words; None if each is what was written."""
    for name, expected in entry.files.items():
        try:
            if file_sha256(entry.folder / name) != expected["sha256"]:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None
