"""What a stage starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bnre_exp.jobs.stages.snapshots import SnapshotFolder


@dataclass(frozen=True)
class Given:
    """What a stage starts from, besides the setting.

    network: of the stage before, which the stage may change; before: name of the row that its headline metric is
    compared with; run_dir: where files for the user go; snapshots: of a training, None if nothing is kept.
    """

    network: nn.Module
    before: str
    run_dir: Path
    snapshots: SnapshotFolder | None = None
