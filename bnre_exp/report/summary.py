"""The table at the end of a run: accuracy stage by stage, and everything that was left out, with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

RUN_FOLDER = "run folder"
LISTED = 4  # entries of a list of exceptions that the console shows; report.md has them all


@dataclass(frozen=True)
class StageResult:
    """One row. value: of the headline metric; delta: its change against the row above that it follows (None for the
    first); loss: None where the task has none; seconds: of the stage itself, without its evaluation; name: of the row,
    as metrics have it."""

    stage: str
    value: float
    delta: float | None
    loss: float | None
    seconds: float
    note: str = ""
    name: str = ""


@dataclass
class Summary:
    """All that a run reports. metric: what the headline metric is called; verdict: sentences; exceptions: heading ->
    ``(name, reason)``; places: what -> path or command."""

    title: str
    metric: str = ""
    verdict: list[str] = field(default_factory=list)
    stages: list[StageResult] = field(default_factory=list)
    exceptions: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)


def stage_table(summary: Summary) -> Table:
    """The stages as a table for the console."""
    table = Table(title=summary.title, title_justify="left", title_style="bold")
    for heading in ("stage", *headings(summary)):
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    table.add_column("", overflow="fold")
    for cells in stage_rows(summary):
        table.add_row(*cells)
    return table


def stage_rows(summary: Summary) -> list[list[str]]:
    """The table: of every row its stage, a text for each of :func:`headings`, and its note."""
    return [[row.stage, *_cells(row, _has_loss(summary)), row.note] for row in summary.stages]


def _has_loss(summary: Summary) -> bool:
    return not summary.stages or any(row.loss is not None for row in summary.stages)


def headings(summary: Summary) -> list[str]:
    """Of the numbers; without a loss where no row has one."""
    return [summary.metric, "change", *(["loss"] if _has_loss(summary) else []), "seconds"]


def _cells(row: StageResult, has_loss: bool) -> list[str]:
    delta = "" if row.delta is None else f"{row.delta:+.4f}"
    loss = "" if row.loss is None else f"{row.loss:.2e}" if abs(row.loss) >= 1e4 else f"{row.loss:.4f}"
    return [f"{row.value:.4f}", delta, *([loss] if has_loss else []), f"{row.seconds:.1f}"]


def print_summary(summary: Summary, console: Console, with_places: bool = True) -> None:
    """Print the verdict, the table, the exceptions grouped by reason, and where things are; of a job of a sweep, only
    its folder."""
    console.print()
    for sentence in summary.verdict:
        console.print(Text(sentence, style="bold"))
    if summary.verdict:
        console.print()
    console.print(stage_table(summary))
    for heading, rows in summary.exceptions.items():
        for line in _lines(rows):
            console.print(Text(f"{heading}: {line}"))
    for what, place in summary.places.items():
        if not with_places and what != RUN_FOLDER:
            continue
        console.print(Text(f"{what}: "), Text(place, style="cyan"), sep="", soft_wrap=True)


def by_reason(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names of ``(name, reason)`` rows, by what is the reason of all of them."""
    names: dict[str, list[str]] = {}
    for name, reason in rows:
        names.setdefault(reason, []).append(name)
    return names


def _lines(rows: Iterable[tuple[str, str]]) -> list[str]:
    lines = []
    for reason, members in by_reason(rows).items():
        more = f" and {len(members) - LISTED} more" if len(members) > LISTED else ""
        lines.append(f"{', '.join(members[:LISTED])}{more} ({reason})")
    return lines


def markdown(summary: Summary) -> str:
    """The whole summary as Markdown, every exception on a line of its own."""
    places = [f"- {what}: `{place}`" for what, place in summary.places.items()]
    return "\n".join([without_places(summary), "## Files and commands", "", *places]) + "\n"


def without_places(summary: Summary) -> str:
    """What the summary says of the network, as Markdown: the table first."""
    names = headings(summary)
    verdict = [line for sentence in summary.verdict for line in (f"**{sentence}**", "")]
    lines = [
        f"# {summary.title}",
        "",
        *verdict,
        f"| stage | {' | '.join(names)} | |",
        f"|---|{'--:|' * len(names)}---|",
    ]
    lines += [f"| {' | '.join(cells)} |" for cells in stage_rows(summary)]
    for heading, rows in summary.exceptions.items():
        lines += ["", f"## {heading}", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in rows] or ["- none"]
    return "\n".join(lines) + "\n"
