"""Where a stage keeps the state of its training, to take it up again."""

from __future__ import annotations

import json
import logging
import os
import uuid
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bnre_exp.algorithms.snapshot import Snapshot
from bnre_exp.digests import file_sha256
from bnre_exp.files import replacing, sweep_unfinished

logger = logging.getLogger(__name__)


class SnapshotFolder:
    """Keeps the newest snapshot of a training in a folder: one file, whose name holds the SHA-256 of its content.

    resumed: whether :meth:`load` found one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.resumed, self._is_told = folder, False, False

    def load(self) -> Snapshot | None:
        """The newest snapshot that is whole, or None."""
        sweep_unfinished(self.folder)
        files = self._files()
        for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
            if file_sha256(path) != path.stem.partition("-")[2]:
                logger.warning("%s is damaged and left out.", path)
                continue
            with suppress(SafetensorError), safe_open(path, "pt") as file:
                if file.metadata().get("of", self.folder.name) != self.folder.name:
                    logger.warning("%s is of another training and left out.", path)
                    continue
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self.resumed = True
                return Snapshot(tensors, json.loads(file.metadata()["values"]))
        return None

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot, whole or not at all, and remove the one before it."""
        try:
            before, path = self._files(), self._write(snapshot)
            for other in before:
                if other != path:
                    other.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            if not self._is_told:
                logger.warning("The state of the training cannot be kept in %s (%s); it goes on.", self.folder, error)
            self._is_told = True

    def _write(self, snapshot: Snapshot) -> Path:
        """Written to a file at once, and named after that: its content as bytes would take twice the time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        written = self.folder / f".snapshot.{uuid.uuid4().hex}.new"  # a name that is swept up after a kill
        try:
            save_file(snapshot.tensors, written, {"of": self.folder.name, "values": json.dumps(snapshot.values)})
            path = self.folder / f"snapshot-{file_sha256(written)}.safetensors"
            with replacing(path, durable=True) as new:
                new.touch()
                written.chmod(
                    new.stat().st_mode
                )  # safetensors writes for the owner alone, and a store may be a group's
                os.replace(written, new)
        finally:
            written.unlink(missing_ok=True)
        return path

    def _files(self) -> list[Path]:
        return list(self.folder.glob("snapshot-*.safetensors"))
