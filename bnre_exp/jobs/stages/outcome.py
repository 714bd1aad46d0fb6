"""What a stage measured and has to report, as files: JSON, and predictions as safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from bnre_exp.tasks.task import Evaluation, Headline

RESULT, PREDICTIONS = "result.json", "predictions.safetensors"
SAMPLES = ("predictions", "scores")  # tensors of an evaluation


@dataclass(frozen=True)
class Measured:
    """One row of the table. stage: as metrics name it; label: as people do; seconds: of the work, without evaluation;
    after: the row that its headline metric is compared with; metrics: more of it, without the ``stage/`` before the
    name."""

    stage: str
    label: str
    evaluation: Evaluation
    seconds: float
    after: str | None = None
    note: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Outcome:
    """All that a stage reports. metrics: by MLflow name; curves: ``(step, metrics)``; exceptions: ``(heading, [(name,
    reason)])``; layers, drift: columns of the table of layers, and of that of batch norms that moved; tables: others,
    ``name: {heading: cells}``; files: what it left in the run's folder, by name."""

    measured: list[Measured] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    exceptions: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    layers: dict[str, list[str]] | None = None
    drift: dict[str, list[Any]] | None = None
    tables: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def except_for(self, heading: str, rows: Sequence[tuple[str, str]]) -> None:
        """Add ``(name, reason)`` rows to the report."""
        self.exceptions.append((heading, [(name, reason) for name, reason in rows]))


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write an outcome into a folder."""
    rows: list[dict[str, Any]] = []
    for row in outcome.measured:
        evaluation = {key: value for key, value in vars(row.evaluation).items() if key not in SAMPLES}
        evaluation = {
            **evaluation,
            "metrics": dict(row.evaluation.metrics),
            "headline": asdict(row.evaluation.headline),
        }
        rows.append({**vars(row), "evaluation": evaluation})
    (folder / RESULT).write_text(json.dumps({**vars(outcome), "measured": rows}))
    tensors = {f"{r.stage}.{name}": vars(r.evaluation)[name] for r in outcome.measured for name in SAMPLES}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / PREDICTIONS)


def read_outcome(folder: Path) -> Outcome:
    """What :func:`write_outcome` wrote, every number exactly."""
    record, tensors = json.loads((folder / RESULT).read_text()), load_file(folder / PREDICTIONS)
    measured = []
    for row in record["measured"]:
        known = {**row["evaluation"], "headline": Headline(**row["evaluation"]["headline"])}
        evaluation = Evaluation(**{**known, **{name: tensors[f"{row['stage']}.{name}"] for name in SAMPLES}})
        measured.append(Measured(**{**row, "evaluation": evaluation}))
    curves = [(step, values) for step, values in record["curves"]]
    exceptions = [(heading, [(name, reason) for name, reason in rows]) for heading, rows in record["exceptions"]]
    return Outcome(**{**record, "measured": measured, "curves": curves, "exceptions": exceptions})
