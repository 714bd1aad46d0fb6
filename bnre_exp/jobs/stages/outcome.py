"""What a stage measured and has to report, as files: JSON, and predictions as safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from bnre_exp.algorithms.evaluate import Evaluation

RESULT, PREDICTIONS = "result.json", "predictions.safetensors"


@dataclass(frozen=True)
class Measured:
    """One row of the table. stage: as metrics name it; label: as people do; seconds: of the work, without evaluation;
    after: the stage that its top-1 is compared with; metrics: more of it, without the ``stage/`` before the name."""

    stage: str
    label: str
    evaluation: Evaluation
    seconds: float
    after: str | None = None
    note: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Outcome:
    """All that a stage reports. metrics: by MLflow name; curves: ``(epoch, metrics)``; exceptions: ``(heading, [(name,
    reason)])``; layers: columns of the layer table."""

    measured: list[Measured] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    exceptions: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    layers: dict[str, list[str]] | None = None

    def except_for(self, heading: str, rows: Sequence[tuple[str, str]]) -> None:
        """Add ``(name, reason)`` rows to the report."""
        self.exceptions.append((heading, [(name, reason) for name, reason in rows]))


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write an outcome into a folder."""
    record: dict[str, Any] = {**vars(outcome), "measured": []}
    for row in outcome.measured:
        evaluation = {"top1": row.evaluation.top1, "loss": row.evaluation.loss, "count": row.evaluation.count}
        record["measured"].append({**asdict(row), "evaluation": evaluation})
    (folder / RESULT).write_text(json.dumps(record))
    save_file({row.stage: row.evaluation.predictions.contiguous() for row in outcome.measured}, folder / PREDICTIONS)


def read_outcome(folder: Path) -> Outcome:
    """What :func:`write_outcome` wrote, every number exactly."""
    record, predictions = json.loads((folder / RESULT).read_text()), load_file(folder / PREDICTIONS)
    measured = []
    for row in record["measured"]:
        evaluation = Evaluation(**row["evaluation"], predictions=predictions[row["stage"]])
        measured.append(Measured(**{**row, "evaluation": evaluation}))
    return Outcome(
        measured,
        record["metrics"],
        [(step, values) for step, values in record["curves"]],
        [(heading, [(name, reason) for name, reason in rows]) for heading, rows in record["exceptions"]],
        record["layers"],
    )
