"""Runs side by side: what differs between them, and their headline metric stage by stage."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnre_exp.tasks.classification import Classification
from bnre_exp.tasks.task import Headline

SIZE = "fold/megabytes"
SEED = "seed"
P_OVER_SEEDS = "reest/p_value_over_seeds"
# What says where and how a job was run, and not what was run.
INCIDENTAL = re.compile(
    r"runtime\.(output_dir|workers)|tracking\..*|store\..*|objective|fp32\.min_\w+|(dataset|task\.kwargs)\.num_classes"
)
EARLIER = {"task._target_": "bnre_exp.tasks.Classification"}  # params that earlier runs do not have, and what they did
NOTHING = "–"


@dataclass(frozen=True)
class RunRow:
    """One run to compare. status: FINISHED, FAILED, KILLED or RUNNING; params: as the user types them, by name;
    metrics: by MLflow name, accuracies in [0, 1]; headline: the metric by which its stages are compared; error: what it
    ended with; overrides: as they were typed; folder: where it left its files; verdict: what re-estimation did;
    spreads: standard deviations of metrics, of several runs that are one row."""

    name: str
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    headline: Headline = Classification.headline
    error: str | None = None
    overrides: str = ""
    folder: str = ""
    verdict: str = ""
    spreads: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column of results. metric: by MLflow name; headline: if it is that metric of a stage."""

    metric: str
    heading: str
    headline: Headline | None = None


def result_columns(rows: Sequence[RunRow], stages: Mapping[str, str]) -> list[Column]:
    """The columns that at least one run has: of every stage (heading by its name in metrics) the headline metric, what
    re-estimation changed, and the size."""
    found: list[Column] = []
    headlines = list(dict.fromkeys(row.headline for row in rows))
    for headline in headlines:
        ending = f", {headline.label}" if len(headlines) > 1 else ""
        for stage, heading in stages.items():
            found.append(Column(f"{stage}/{headline.name}", heading + ending, headline))
            if stage == "reest":
                found.append(Column(f"{stage}/delta_{headline.name}", f"change{ending}"))
    found += [Column(P_OVER_SEEDS, "p over seeds"), Column(SIZE, "MB")]
    return [column for column in found if any(column.metric in row.metrics for row in rows)]


def differing_params(rows: Sequence[RunRow]) -> list[str]:
    """Names of the params that not all runs share, in the order of the configuration; the seed last, so that runs which
    differ in it alone stand together."""
    names = list(dict.fromkeys(name for row in rows for name in row.params))
    names = sorted((name for name in names if not INCIDENTAL.fullmatch(name)), key=lambda name: name == SEED)
    return [name for name in names if len({row.params.get(name, EARLIER.get(name)) for row in rows}) > 1]


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


def short_names(names: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """Each name by its last part where that is clear and not ``taken``: weight_bits for quant.weight_bits, model for
    model.name."""
    parts = [name.split(".") for name in names]
    last = [p[-2] if len(p) > 1 and p[-1] in ("name", "_target_") else p[-1] for p in parts]
    clear = [last.count(short) == 1 and short not in (*taken, "run", "status") for short in last]
    return {name: short if ok else name for name, short, ok in zip(names, last, clear)}


def comparison_columns(rows: Sequence[RunRow], stages: Mapping[str, str]) -> dict[str, list[str]]:
    """The table: a text for every run by heading. Runs are ordered by the params that differ. Raises ``ValueError`` if
    there are no runs."""
    if not rows:
        raise ValueError("There are no runs to compare.")
    rows, names = ordered(rows), differing_params(rows)
    results = result_columns(rows, stages)
    short = short_names(names, [column.heading for column in results])
    columns = {short[name]: _values(rows, name) for name in names}
    if not columns:
        columns = {"run": [row.name for row in rows]}
    for column in results:
        columns[column.heading] = [_cell(column, row) for row in rows]
    if any(row.status != "FINISHED" for row in rows):
        columns["status"] = [row.status for row in rows]
    return columns


def _values(rows: Sequence[RunRow], name: str) -> list[str]:
    """A param of every run; a callable's dotted path by its last part where that is clear."""
    texts = [row.params.get(name, NOTHING) for row in rows]
    last = [text.rpartition(".")[2] for text in texts]
    return last if name.endswith("_target_") and len(set(last)) == len(set(texts)) else texts


def _cell(column: Column, row: RunRow) -> str:
    value, spread = row.metrics.get(column.metric), row.spreads.get(column.metric)
    if value is None:
        return NOTHING
    if column.metric == SIZE:
        return f"{value:.2f}"
    is_change = column.headline is None and column.metric != P_OVER_SEEDS
    return f"{value:{'+' if is_change else ''}.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def is_best(heading: str, cell: str, best: Mapping[str, float]) -> bool:
    """Whether a cell shows the best value of its column."""
    return heading in best and cell.partition(" ")[0] == f"{best[heading]:.4f}"


def best_values(rows: Sequence[RunRow], stages: Mapping[str, str]) -> dict[str, float]:
    """The best value of each headline metric, by heading, unless all are the same."""
    best = {}
    for column in result_columns(rows, stages):
        found = {row.metrics.get(column.metric, math.nan) for row in rows}
        values = {value for value in found if not math.isnan(value)}
        if column.headline is not None and len(values) > 1:
            best[column.heading] = max(values) if column.headline.higher_is_better else min(values)
    return best


def without_results(rows: Sequence[RunRow], stages: Mapping[str, str]) -> list[RunRow]:
    """Runs that did not finish and have nothing to compare; columns of what they alone set would help nobody."""
    measured = {column.metric for column in result_columns(rows, stages)}
    return [row for row in rows if row.status != "FINISHED" and not measured & set(row.metrics)]


def titled(title: str, rows: Sequence[RunRow]) -> str:
    """The title with what the columns show; where that is more than one metric, the headings say it."""
    labels = list(dict.fromkeys(row.headline.label for row in rows))
    return f"{title}: {labels[0]}" if len(labels) == 1 else title


def comparison_table(title: str, rows: Sequence[RunRow], stages: Mapping[str, str], width: int = 120) -> Group:
    """The table for a console of ``width`` columns, the best of each headline metric bold, and below it the runs that
    did not finish, with their errors. Raises ``ValueError`` without runs."""
    if not rows:
        raise ValueError("There are no runs to compare.")
    absent = without_results(rows, stages)
    shown = [row for row in rows if row not in absent]
    title = titled(title, shown)
    parts: list[RenderableType] = [] if shown else [Text(title, style="bold")]
    if shown:
        parts += _table_that_fits(title, shown, stages, width)
    ended = [row for row in rows if row in absent or row.error]
    if ended:
        parts.append(Text(f"\n{len(ended)} did not finish:"))
    for row in ended:
        parts.append(Padding(Text(f"{row.status}  {row.name}  {row.overrides}".rstrip()), (0, 0, 0, 2)))
        parts += [Padding(Text(row.error), (0, 0, 0, 4))] if row.error else []
    return Group(*parts)


def _table_that_fits(
    title: str, rows: Sequence[RunRow], stages: Mapping[str, str], width: int
) -> Sequence[RenderableType]:
    """A column a setting where no word must break for that; else the runs numbered, and their settings below."""
    columns, settings = comparison_columns(rows, stages), len(differing_params(rows)) or 1
    console = Console(width=width)
    for is_wide in (False, True):
        table = _table(title, columns, best_values(rows, stages), settings, is_wide)
        size = Measurement.get(console, console.options.update(width=10_000), table)
        if (size.minimum if is_wide else size.maximum) <= width:
            return [table]
    short = {heading: cells for place, (heading, cells) in enumerate(columns.items()) if place >= settings}
    numbers = [str(number) for number in range(1, len(rows) + 1)]
    texts = [
        " ".join(f"{heading}={cells[place]}" for heading, cells in list(columns.items())[:settings])
        for place in range(len(rows))
    ]
    below = [Padding(Text(f"{number}: {text}"), (0, 0, 0, 1)) for number, text in zip(numbers, texts)]
    return [_table(title, {"run": numbers, **short}, best_values(rows, stages), 1, is_wide=True), *below]


def _table(
    title: str, columns: Mapping[str, list[str]], best: Mapping[str, float], settings: int, is_wide: bool
) -> Table:
    """settings: how many columns say what a run is. is_wide: headings break at hyphens, spreads stand below their
    means (rich measures words, and would take the room from the settings), and there are no lines."""
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD if is_wide else box.HEAVY_HEAD,
        collapse_padding=is_wide, pad_edge=not is_wide,
    )  # fmt: skip
    for place, heading in enumerate(columns):
        # left to itself, the table would break names anywhere
        text = re.sub(r"([_.-])(?=.)", r"\1\n", heading.replace("recalib", "recali-b")) if is_wide else heading
        left = place < settings or heading == "status"
        table.add_column(Text(text), justify="left" if left else "right", overflow="fold", no_wrap=place >= settings)
    for cells in zip(*columns.values()):
        best_here = [is_best(heading, cell, best) for heading, cell in zip(columns, cells)]
        shown = [cell.replace(" ± ", "\n± ") if is_wide else cell for cell in cells]
        table.add_row(*(Text(cell, style="bold" if bold else "") for cell, bold in zip(shown, best_here)))
    return table


def comparison_markdown(title: str, rows: Sequence[RunRow], stages: Mapping[str, str]) -> str:
    """The table as a page; the best of each headline metric is bold; runs that did not finish are listed below, with
    their errors. Raises ``ValueError`` without runs."""
    if not rows:
        raise ValueError("There are no runs to compare.")
    absent = without_results(rows, stages)
    shown = [row for row in rows if row not in absent]
    title = titled(title, shown)
    lines = [f"# {title}", "", *(_markdown_table(shown, stages) if shown else [])]
    ended = [row for row in rows if row in absent or row.error]
    if ended:
        lines += ["", f"{len(ended)} did not finish:", ""]
    for row in ended:
        settings = f" `{row.overrides}`" if row.overrides else ""
        lines.append(f"- {row.status} {row.name}{settings}" + (f": {row.error}" if row.error else ""))
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[RunRow], stages: Mapping[str, str]) -> list[str]:
    columns, best = comparison_columns(rows, stages), best_values(rows, stages)
    settings = len(differing_params(rows)) or 1
    rules = ["---" if n < settings or heading == "status" else "--:" for n, heading in enumerate(columns)]
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(rules)}|"]
    for cells in zip(*columns.values()):
        texts = [
            f"**{cell}**" if is_best(heading, cell, best) else cell.replace("|", "\\|")
            for heading, cell in zip(columns, cells)
        ]
        lines.append(f"| {' | '.join(texts)} |")
    return lines


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
