"""Runs side by side: what differs between them, and their accuracy stage by stage."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

# Metric and heading, in the order of the stages.
COLUMNS = (
    ("fp32/top1", "FP32"),
    ("ptq/top1", "quantized"),
    ("recal_only/top1", "recalibrated"),
    ("qat/top1", "QAT"),
    ("reest/top1", "re-estimated"),
    ("reest/delta_top1", "change"),
    ("fold/top1", "folded"),
    ("fold/megabytes", "MB"),
)
BEST = [metric for metric, _ in COLUMNS if metric.endswith("/top1")]
# What says where and how a job was run, and not what was run.
INCIDENTAL = re.compile(r"runtime\.(output_dir|workers)|tracking\..*|store\..*|objective|fp32\.min_top1")
NOTHING = "–"
RESULTS = {"run", "status", *(heading for _, heading in COLUMNS)}  # headings that are not params
WIDTH = 120  # characters that the console's table should fit


@dataclass(frozen=True)
class RunRow:
    """One run to compare. status: FINISHED, FAILED, KILLED or RUNNING; params: as the user types them, by name;
    metrics: by MLflow name, accuracies in [0, 1]."""

    name: str
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]


def differing_params(rows: Sequence[RunRow]) -> list[str]:
    """Names of the params that not all runs share, in the order of the configuration."""
    names = list(dict.fromkeys(name for row in rows for name in row.params))
    names = [name for name in names if not INCIDENTAL.fullmatch(name)]
    return [name for name in names if len({row.params.get(name) for row in rows}) > 1]


def number(text: str | None) -> float | None:
    """The number that a param's text is, None if it is none."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def ordered(rows: Sequence[RunRow]) -> list[RunRow]:
    """Runs by the params that differ: numbers by their size, after them words (resnet18 before resnet101)."""
    names = differing_params(rows)
    return sorted(rows, key=lambda row: [_place(row.params.get(name, NOTHING)) for name in names])


def _place(text: str) -> tuple[Any, ...]:
    value = number(text)
    parts = re.split(r"([0-9]+)", text)  # words and digits alternate, so that like is compared with like
    return (0, value) if value is not None else (1, *(int(p) if n % 2 else p for n, p in enumerate(parts)))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each name by its last part where that is clear: weight_bits for quant.weight_bits, model for model.name."""
    parts = [name.split(".") for name in names]
    last = [p[-2] if len(p) > 1 and p[-1] in ("name", "_target_") else p[-1] for p in parts]
    clear = [last.count(short) == 1 and short not in RESULTS for short in last]
    return {name: short if ok else name for name, short, ok in zip(names, last, clear)}


def measured(rows: Sequence[RunRow]) -> list[tuple[str, str]]:
    """Metric and heading of the columns that at least one run has."""
    return [(metric, heading) for metric, heading in COLUMNS if any(metric in row.metrics for row in rows)]


def comparison_columns(rows: Sequence[RunRow]) -> dict[str, list[str]]:
    """The table: a text for every run by heading. Runs are ordered by the params that differ. Raises ``ValueError`` if
    there are no runs."""
    if not rows:
        raise ValueError("There are no runs to compare.")
    rows, names = ordered(rows), differing_params(rows)
    columns = {short: _values(rows, name) for name, short in short_names(names).items()}
    if not columns:
        columns = {"run": [row.name for row in rows]}
    for metric, heading in measured(rows):
        columns[heading] = [_cell(metric, row.metrics.get(metric)) for row in rows]
    if any(row.status != "FINISHED" for row in rows):
        columns["status"] = [row.status for row in rows]
    return columns


def _values(rows: Sequence[RunRow], name: str) -> list[str]:
    """A param of every run; a callable's dotted path by its last part where that is clear."""
    texts = [row.params.get(name, NOTHING) for row in rows]
    last = [text.rpartition(".")[2] for text in texts]
    return last if name.endswith("_target_") and len(set(last)) == len(set(texts)) else texts


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return NOTHING
    if metric.endswith("megabytes"):
        return f"{value:.2f}"
    return f"{value:+.4f}" if metric.endswith("delta_top1") else f"{value:.4f}"


def _best(rows: Sequence[RunRow]) -> dict[str, float]:
    """The largest value of each accuracy, by heading, unless all are the same."""
    best = {}
    for metric, heading in COLUMNS:
        values = {row.metrics[metric] for row in rows if metric in row.metrics and not math.isnan(row.metrics[metric])}
        if metric in BEST and len(values) > 1:
            best[heading] = max(values)
    return best


def comparison_table(title: str, rows: Sequence[RunRow]) -> Table:
    """The table for the console; the best of each accuracy is bold. Raises ``ValueError`` if there are no runs."""
    columns, best = comparison_columns(rows), _best(rows)
    wide = 1 + sum(max(map(len, [heading, *cells])) + 3 for heading, cells in columns.items()) > WIDTH
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD if wide else box.HEAVY_HEAD,
        collapse_padding=wide, pad_edge=not wide,
    )  # fmt: skip
    settings = len(differing_params(rows)) or 1
    for place, heading in enumerate(columns):
        # left to itself, the table would break names anywhere
        text = re.sub(r"([_.-])(?=.)", r"\1\n", heading.replace("recalib", "recali-b")) if wide else heading
        left = place < settings or heading == "status"
        table.add_column(Text(text), justify="left" if left else "right", overflow="fold", no_wrap=place >= settings)
    for cells in zip(*columns.values()):
        best_here = [heading in best and cell == f"{best[heading]:.4f}" for heading, cell in zip(columns, cells)]
        table.add_row(*(Text(cell, style="bold" if bold else "") for cell, bold in zip(cells, best_here)))
    return table


def comparison_markdown(title: str, rows: Sequence[RunRow]) -> str:
    """The table as a page of its own; the best of each accuracy is bold. Raises ``ValueError`` if there are no runs."""
    columns, best = comparison_columns(rows), _best(rows)
    settings = len(differing_params(rows)) or 1
    rules = ["---" if n < settings or heading == "status" else "--:" for n, heading in enumerate(columns)]
    lines = [f"# {title}", "", f"| {' | '.join(columns)} |", f"|{'|'.join(rules)}|"]
    for cells in zip(*columns.values()):
        texts = [
            f"**{cell}**" if heading in best and cell == f"{best[heading]:.4f}" else cell.replace("|", "\\|")
            for heading, cell in zip(columns, cells)
        ]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def comparison_csv(rows: Sequence[RunRow]) -> str:
    """Name, status, the params that differ, and every metric, unrounded, as CSV (RFC 4180)."""
    if not rows:
        raise ValueError("There are no runs to compare.")
    params = differing_params(rows)
    metrics = sorted({name for row in rows for name in row.metrics})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["name", "status", *params, *metrics])
    for row in ordered(rows):
        values = [repr(float(row.metrics[name])) if name in row.metrics else "" for name in metrics]
        writer.writerow([row.name, row.status, *(row.params.get(name, "") for name in params), *values])
    return text.getvalue()
