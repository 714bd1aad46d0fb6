"""The page of a sweep: where re-estimation helped, the plots, the table, and what did not finish."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from bnre_exp.report import page
from bnre_exp.report.comparison import (
    RunRow,
    best_values,
    comparison_columns,
    differing_params,
    is_best,
    ordered,
    titled,
    without_results,
)
from bnre_exp.report.plots import COLOURS, label_of
from bnre_exp.report.seeds import over_seeds
from bnre_exp.report.svg import Dot, dot_chart
from bnre_exp.report.verdict import HARMED, HELPED, SAME, UNCLEAR

MOST_RUNS = 40  # of the picture of changes
DID = {
    HELPED: "helped in {}",
    SAME: "made no difference that the test images can show in {}",
    HARMED: "harmed in {}",
    UNCLEAR: "is unclear in {}",
}
SHADES = {HELPED: 2, HARMED: 1}  # colours of the page
# What plots are drawn in, and the page's name for it, which is another colour in the dark.
NAMED = {
    "#ffffff": "paper", "#000000": "ink", "#dddddd": "rule", "#777777": "muted",
    **{colour.lower(): f"c{number}" for number, colour in enumerate(COLOURS)},
}  # fmt: skip


def comparison_page(
    title: str, rows: Sequence[RunRow], stages: Mapping[str, str], folder: Path, pictures: Sequence[Path]
) -> str:
    """The comparison as one HTML file to stand in ``folder``, which needs nothing else but has links to the pages of
    the runs. rows: run by run; those that differ in the seed alone are one row of a table of their own. stages:
    headings by their names in metrics; pictures: SVG files of :func:`save_plots`. Raises ``ValueError`` without runs.
    """
    if not rows:
        raise ValueError("There are no runs to compare.")
    absent = without_results(rows, stages)
    shown = ordered([row for row in rows if row not in absent])
    name = titled(title, shown) if shown else title
    counted = f"{sum(row.status == 'FINISHED' for row in rows)} of {len(rows)} runs finished"
    joined = over_seeds(shown)
    plots = [_inlined(path.read_text(encoding="utf-8"), path.stem) for path in pictures]
    return page.document(
        name,
        f'<header>\n<p class="name">{escape(name)}; {counted}</p>',
        f"<h1>{_heading(shown) or escape(name)}</h1>\n</header>",
        _changes(shown),
        page.figures(*map(page.figure, plots), kind="plots"),
        page.section("Over seeds", _table(ordered(joined), stages, folder) if len(joined) < len(shown) else ""),
        page.section("Run by run", _table(shown, stages, folder) if shown else ""),
        page.section("What did not finish", *(_failed(row, folder) for row in rows if row in absent or row.error)),
    )


def _heading(rows: Sequence[RunRow]) -> str:
    """In how many runs re-estimation helped."""
    words = Counter(row.verdict for row in rows if row.verdict in DID)
    total = sum(words.values())
    said = [DID[word].format(f"{words[word]} of {total} runs") for word in DID if words[word]]
    return f"<span>Re-estimation {escape(', '.join(said))}</span>" if said else ""


def _changes(rows: Sequence[RunRow]) -> str:
    """What re-estimation did in each run, with its interval."""
    names = differing_params(rows)
    found = [row for row in rows if "reest/score_change" in row.metrics]
    dots = []
    for row in found[:MOST_RUNS]:
        change, low, high = (row.metrics[f"reest/score_{what}"] for what in ("change", "low", "high"))
        is_told = row.verdict in SHADES
        label = label_of(row, names) or row.name
        dots.append(Dot(label, change, f"{change:+.4f}", (low, high), not is_told, SHADES.get(row.verdict, 0)))
    title = "What re-estimation changed"
    notes = ["mean score of a test image, the higher the better, with its 95% interval; hollow: no difference is sure"]
    notes += [f"the first {MOST_RUNS} of {len(found)} runs"] if len(found) > MOST_RUNS else []
    chart = dot_chart(title, dots, axis="change", reference=0.0)
    return page.figure(chart, title, "; ".join(notes))


def _table(rows: Sequence[RunRow], stages: Mapping[str, str], folder: Path) -> str:
    """The comparison, the best of each headline metric bold, with links to the runs."""
    columns, best, settings = (
        comparison_columns(rows, stages),
        best_values(rows, stages),
        len(differing_params(rows)) or 1,
    )
    kinds = ["" if n < settings or heading == "status" else "number" for n, heading in enumerate(columns)]
    cells = [
        [
            f"<b>{_number(cell)}</b>" if is_best(heading, cell, best) else _number(cell)
            for heading, cell in zip(columns, line)
        ]
        for line in zip(*columns.values())
    ]
    headings = list(columns)
    if any(row.verdict for row in rows):
        headings, kinds = [*headings, "re-estimation"], [*kinds, ""]
        cells = [[*line, escape(row.verdict)] for line, row in zip(cells, rows)]
    if any(row.folder for row in rows):
        headings, kinds = [*headings, "report"], [*kinds, ""]
        cells = [[*line, _report(row, folder)] for line, row in zip(cells, rows)]
    return page.table(headings, cells, kinds)


def _number(cell: str) -> str:
    """A cell; a mean may be on the line above its spread."""
    return escape(cell).replace(" ± ", " ±&nbsp;")


def _report(row: RunRow, folder: Path, text: str = "") -> str:
    """A link to the page of a run, by default with its folder's name; that name alone where it has no page, as when its
    process was killed."""
    if not row.folder:
        return ""
    report = Path(row.folder) / page.REPORT
    name = report.parent.name
    return page.link(text or name, page.relative(report, folder)) if report.exists() else escape(name)


def _failed(row: RunRow, folder: Path) -> str:
    about = " ".join(part for part in (escape(row.name), page.code(row.overrides) if row.overrides else "") if part)
    return f"<p>{about} {_report(row, folder, 'report')}</p>\n{page.failure(row.status, row.error or '')}"


def _inlined(svg: str, name: str) -> str:
    """The markup of a plot for a page: its names are its own, its colours the page's."""
    svg = re.sub(
        r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg[svg.index("<svg") :], flags=re.S
    )
    found = re.search(r"<title>(.*?)</title>", svg, flags=re.S)
    title = found[1].strip() if found else escape(name)
    svg = re.sub(r"<title>.*?</title>", "", svg, count=1, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub("|".join(NAMED), lambda colour: f"var(--{NAMED[colour[0]]})", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    head = (
        f'<svg {box[0] if box else ""} role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{title}</title>'
        f'<desc id="{name}-d">The numbers are in the table below.</desc>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
