"""The page of a run: its verdict, the pictures of it, and everything else that it says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from bnre_exp.algorithms.drift import BN, KIND, KL, RATIO, RATIOS, SHIFT, SHIFTS
from bnre_exp.report import page
from bnre_exp.report.comparison import INCIDENTAL, NOTHING
from bnre_exp.report.plots import as_beginning
from bnre_exp.report.summary import RUN_FOLDER, Summary, by_reason, headings, stage_rows
from bnre_exp.report.svg import Dot, bar_chart, dot_chart, line_chart
from bnre_exp.tasks.task import Headline

COMPARED = ("recal_only", "reest_only")  # rows of networks that no later stage goes on with
TRAINED = {"fp32": "FP32", "qat": "QAT"}  # stages with curves
LIMITS = "fp32."  # settings that may have ended the run
MOST_LINES = 8  # of a list that is not folded away
MOST_LAYERS = 40  # of a picture layer by layer
Columns = Mapping[str, Sequence[str | float]]


@dataclass(frozen=True)
class RunPage:
    """All that the page of a run shows.

    metrics: by MLflow name; curves: values of metrics by epoch; intervals: of a row's headline metric, by the row's
    name; settings, defaults: as the user types them, by name, here and in a command without overrides (empty where that
    is not known); overrides: as they were typed; error: status and message of a run that did not finish; drift: what
    re-estimation changed in each BN, as :func:`~bnre_exp.algorithms.drift.drift_columns` has it, and the change of the
    headline metric by each BN alone where that was measured; by_batches: the headline metric by number of batches of
    re-estimation; tables: others, cells by heading, by their names.
    """

    summary: Summary
    folder: Path
    headline: Headline
    metrics: Mapping[str, float]
    curves: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    overrides: str = ""
    error: tuple[str, str] | None = None
    drift: Columns | None = None
    by_batches: Mapping[int, float] | None = None
    tables: Mapping[str, Columns] = field(default_factory=dict)


def run_page(run: RunPage) -> str:
    """A run as one HTML file, which needs nothing else."""
    summary = run.summary
    kinds = ["", *["number"] * len(headings(summary)), "long"]
    rows = [[escape(cell) for cell in cells] for cells in stage_rows(summary)]
    stages = page.table(["stage", *headings(summary), ""], rows, kinds) if rows else ""
    return page.document(
        summary.title,
        _header(run),
        page.figures(_stages(run), _scores(run), *_curves(run), _by_batches(run), *_sizes(run.metrics)),
        _drift(run.drift, run.headline.label),
        page.section("Stage by stage", stages),
        page.section("What is left out, and notes", *_exceptions(summary.exceptions)),
        page.section(
            "Layers", *(page.folded_away(as_beginning(name), _table(run.tables[name])) for name in run.tables)
        ),
        page.section("Settings", *_settings(run)),
        page.section("Files and commands", _places(summary.places, run.folder)),
    )


def _header(run: RunPage) -> str:
    parts = [f'<p class="name">{escape(run.summary.title)}</p>'] if run.summary.verdict else []
    parts += [page.failure(*run.error)] if run.error else []
    parts.append(f"<h1>{''.join(map(_sentence, run.summary.verdict)) or escape(run.summary.title)}</h1>")
    return f"<header>\n{''.join(parts)}\n</header>"


def _sentence(verdict: str) -> str:
    """A verdict, its figures below what it says."""
    said, colon, figures = verdict.partition(": ")
    return f"<span>{escape(said)}{f'<small>{escape(figures)}</small>' if colon else ''}</span>"


def _stages(run: RunPage) -> str:
    """The headline metric, stage by stage."""
    label, summary = run.headline.label, run.summary
    dots = [
        Dot(row.stage, row.value, f"{row.value:.4f}", run.intervals.get(row.name), row.name in COMPARED)
        for row in summary.stages
    ]
    float_value = next((row.value for row in summary.stages if row.name == "fp32"), None)
    notes = ["on the test data; the higher the better" if run.headline.higher_is_better else "the lower the better"]
    notes += ["dashed: FP32"] if float_value is not None else []
    notes += ["hollow: for comparison"] if any(dot.is_hollow for dot in dots) else []
    if any(dot.interval for dot in dots):
        notes.append("bars: 95% interval of the change from the network before, on the same images")
    title = f"{as_beginning(label)} stage by stage"
    return page.figure(dot_chart(title, dots, reference=float_value), title, "; ".join(notes))


def _scores(run: RunPage) -> str:
    """What a paired test told of rows whose metric is not the mean of the scores, so that its interval is none of the
    metric's."""
    dots = []
    for row in run.summary.stages:
        change, low, high = (
            run.metrics.get(f"{row.name}/score_{name}", math.nan) for name in ("change", "low", "high")
        )
        if math.isfinite(change) and row.name not in run.intervals:
            dots.append(Dot(row.stage, change, f"{change:+.4f}", (low, high), row.name in COMPARED))
    title, note = "Change of an image's score", "from the network before, with its 95% interval; the higher the better"
    return page.figure(dot_chart(title, dots, reference=0.0), title, note)


def _curves(run: RunPage) -> list[str]:
    """Loss, headline metric and oscillating weights by epoch."""
    shown = {
        "Training loss": "train_loss",
        f"{as_beginning(run.headline.label)} on validation data": f"val_{run.headline.name}",
        "Part of the weights that oscillates": "oscillating",
    }
    found = []
    for title, metric in shown.items():
        lines = {label: run.curves.get(f"{stage}/{metric}", {}) for stage, label in TRAINED.items()}
        found.append(page.figure(line_chart(title, lines, x_label="epoch"), title))
    return found


def _by_batches(run: RunPage) -> str:
    title = f"{as_beginning(run.headline.label)} by batches of re-estimation"
    numbers = {count: value for count, value in (run.by_batches or {}).items() if count > 0}
    chart = line_chart(title, {"re-estimated": numbers}, x_label="batches", is_log=True)
    return page.figure(chart, title, "on validation data")


def _sizes(metrics: Mapping[str, float]) -> list[str]:
    """Megabytes and milliseconds, as far as they were measured."""
    file, part = metrics.get("export/megabytes", math.nan), metrics.get("export/size_vs_fp32", math.nan)
    sizes = {
        "FP32": file / part if part else math.nan,
        "folded, codes at their bits": metrics.get("fold/megabytes", math.nan),
        "checkpoint": file,
        "ONNX model": metrics.get("onnx/megabytes", math.nan),
    }
    times = {
        "FP32": metrics.get("onnx/fp32_milliseconds", math.nan),
        "quantized": metrics.get("onnx/milliseconds", math.nan),
    }
    size, time = "Size", "Time of an image in ONNX Runtime"
    return [
        page.figure(bar_chart(size, [(name, value, f"{value:.2f} MB") for name, value in sizes.items()]), size),
        page.figure(bar_chart(time, [(name, value, f"{value:.2f} ms") for name, value in times.items()]), time),
    ]


def _drift(columns: Columns | None, label: str) -> str:
    """What re-estimation changed, layer by layer: pictures of the layers that changed most, and a table of all."""
    if not columns or not columns[BN]:
        return ""
    names, kinds = ([str(cell) for cell in columns[heading]] for heading in (BN, KIND))
    measured = {name: [float(cell) for cell in cells] for name, cells in columns.items() if name not in (BN, KIND)}
    most_first = sorted(range(len(names)), key=lambda n: -measured[KL][n] if math.isfinite(measured[KL][n]) else 0.0)
    shown = sorted(most_first[:MOST_LAYERS])
    colours = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    few = f"; the {len(shown)} of {len(names)} layers that moved most" if len(shown) < len(names) else ""

    def chart(
        title: str, note: str, axis: str, middle: Sequence[float], texts: Sequence[str], *ends: Sequence[float]
    ) -> str:
        dots = [
            Dot(names[n], middle[n], texts[n], (ends[0][n], ends[1][n]) if ends else None, False, colours[kinds[n]])
            for n in shown
        ]
        legend = [kind or "unknown" for kind in colours] if len(colours) > 1 else []
        picture = dot_chart(title, dots, axis=axis, reference=0.0, names=legend)
        return page.figure(picture, title, f"{note}{few}".removeprefix("; "))

    over_channels = "dot and bar: median and middle 90% of the channels"
    shifts, ratios = ([measured[name] for name in headings] for headings in (SHIFTS, RATIOS))
    doublings = [[math.log2(ratio) if ratio > 0 else math.nan for ratio in part] for part in ratios]
    pictures = [
        chart(
            "Shift of the mean", f"{over_channels}; number: their root mean square", "standard deviations before",
            shifts[1], [f"{shift:.3g}" for shift in measured[SHIFT]], shifts[0], shifts[2],
        ),
        chart(
            "Variance after to before", f"{over_channels}; number: their geometric mean", "doublings (-1: half)",
            doublings[1], [f"× {ratio:.4g}" for ratio in measured[RATIO]], doublings[0], doublings[2],
        ),
    ]  # fmt: skip
    title, changes = f"{as_beginning(label)} by re-estimating one BN alone", measured.get(f"{label} alone", [])
    alone = chart(title, "on validation data", "change", changes, [f"{n:+.4f}" for n in changes]) if changes else ""
    table = page.folded_away(f"All {len(names)} layers", _table(columns))
    return page.section("Drift of the BN statistics", page.figures(*pictures), page.figures(alone), table)


def _table(columns: Columns) -> str:
    """A table of texts and numbers, all of it."""
    kinds = ["number" if all(isinstance(cell, (int, float)) for cell in cells) else "" for cells in columns.values()]
    rows = [
        [escape(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row]
        for row in zip(*columns.values())
    ]
    return page.table(list(columns), rows, kinds)


def _exceptions(exceptions: Mapping[str, Sequence[tuple[str, str]]]) -> list[str]:
    """Every exception, those of one reason together; last the headings that have none."""
    parts = []
    for heading, rows in exceptions.items():
        if not rows:
            continue
        lines = [_line(reason, names) for reason, names in by_reason(rows).items()]
        listed = page.bullets(lines)
        if len(lines) > MOST_LINES:
            parts.append(page.folded_away(f"{heading} ({len(rows)})", listed, "told"))
        else:
            parts.append(f"<h3>{escape(heading)}</h3>\n{listed}")
    empty = ", ".join(heading for heading, rows in exceptions.items() if not rows)
    return [*parts, f"<p>Nothing under: {escape(empty)}.</p>" if empty else ""]


def _line(reason: str, names: Sequence[str]) -> str:
    listed = ", ".join(page.code(name) for name in names)
    if len(names) <= MOST_LINES:
        return f"{listed}: {escape(reason)}"
    return page.folded_away(f"{len(names)} × {reason}", listed, "told")


def _settings(run: RunPage) -> list[str]:
    """What was typed, what differs from a command without overrides, and all."""

    def table(settings: Mapping[str, str]) -> str:
        texts = [(name, text, run.defaults.get(name, NOTHING)) for name, text in settings.items()]
        rows = [[page.code(name), escape(text), escape(plain)] for name, text, plain in texts]
        kept = 3 if run.defaults else 2
        headings, kinds = ["setting", "here", "plain command"], ["", "value", "value"]
        return page.table(headings[:kept], [row[:kept] for row in rows], kinds[:kept])

    changed = {
        name: text
        for name, text in run.settings.items()
        if run.defaults
        and text != run.defaults.get(name)
        and (name.startswith(LIMITS) or not INCIDENTAL.fullmatch(name))
    }
    parts = [f"<p>As typed: {page.code(run.overrides)}</p>"] if run.overrides else []
    if changed:
        parts += ["<p>What differs from a plain command, beside where and how it ran:</p>", table(changed)]
    elif run.defaults:
        parts.append("<p>Nothing differs from a plain command, beside where and how it ran.</p>")
    parts += [page.folded_away(f"All {len(run.settings)} settings", table(run.settings))] if run.settings else []
    return parts


def _places(places: Mapping[str, str], folder: Path) -> str:
    """Files that the run left, as links where they are below the page."""
    shown = {}
    for what, place in places.items():
        path = Path(place)
        if place.startswith(("http://", "https://")):
            shown[what] = page.link(place, place)
        elif what != RUN_FOLDER and path.is_absolute() and path.is_relative_to(folder.absolute()):
            shown[what] = page.link(path.name, page.relative(path, folder.absolute()))
        else:
            shown[what] = page.code(place)
    return page.described(shown) if shown else ""
