"""Where a training keeps its state between two epochs."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bnre_exp.algorithms.snapshot import Snapshot
from bnre_exp.digests import file_sha256

logger = logging.getLogger(__name__)


class SnapshotFolder:
    """Keeps the newest snapshot of a training in a folder: one file, whose name holds the SHA-256 of its content.

    resumed: whether :meth:`load` found one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.resumed, self._is_told = folder, False, False

    def load(self) -> Snapshot | None:
        """The newest snapshot that is whole, or None."""
        files = self._files()
        for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
            if file_sha256(path) != path.stem.partition("-")[2]:
                logger.warning("%s is damaged and left out.", path)
                continue
            with suppress(SafetensorError), safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self.resumed = True
                return Snapshot(tensors, json.loads(file.metadata()["values"]))
        return None

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot, whole or not at all, and remove the one before it."""
        new = self.folder / f"new-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(snapshot.tensors, new, {"values": json.dumps(snapshot.values)})
            with open(new, "rb") as file:
                os.fsync(file.fileno())
            sha = file_sha256(new)
            before = self._files()
            os.replace(new, self.folder / f"snapshot-{sha}.safetensors")
            for path in before:
                if path.stem != f"snapshot-{sha}":
                    path.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            new.unlink(missing_ok=True)
            if not self._is_told:
                logger.warning("The state of the training cannot be kept in %s (%s); it goes on.", self.folder, error)
            self._is_told = True

    def _files(self) -> list[Path]:
        return list(self.folder.glob("snapshot-*.safetensors"))
