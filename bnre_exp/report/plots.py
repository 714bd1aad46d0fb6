"""Plots of a comparison, as PNG and SVG that need nothing to be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnre_exp.report.comparison import SIZE, RunRow, differing_params, number, ordered, short_names
from bnre_exp.tasks.task import Headline

BITS, BATCHES = "quant.weight_bits", "reest.num_batches"
REEST = ("reest.",)  # what belongs to re-estimation itself
# Okabe and Ito, "Color universal design", 2008: told apart by people who see colours differently.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_RUNS = 12  # of a plot stage by stage

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """Runs that differ in nothing else. before: ``(x, headline metric)`` without re-estimated statistics; after: the
    same with them, by what sets them apart among themselves."""

    label: str
    before: Points
    after: dict[str, Points]


@dataclass(frozen=True)
class SizePoint:
    """A folded network: megabytes, its headline metric, and what it is called."""

    megabytes: float
    value: float
    label: str


def before(row: RunRow) -> float | None:
    """The headline metric of what re-estimation starts from: after QAT, else recalibrated only, else quantized."""
    values = (_headline(row, stage) for stage in ("qat", "recal_only", "ptq"))
    return next((value for value in values if value is not None), None)


def fair_before(rows: Sequence[RunRow]) -> set[float | None]:
    """What runs that differ in re-estimation alone start from. Where some were recalibrated for comparison, the others'
    value under old ranges is no fair start: it would credit re-estimation with what new ranges do."""
    not_trained = [row for row in rows if _headline(row, "qat") is None]
    recalibrated = {value for row in not_trained if (value := _headline(row, "recal_only")) is not None}
    return recalibrated or {before(row) for row in rows}  # type: ignore[return-value]


def bits_of(row: RunRow) -> float | None:
    """Bits of the weights, infinity for float weights, None where the run does not say."""
    text = row.params.get(BITS)
    return math.inf if text == "null" else number(text)


def _metric(row: RunRow, name: str) -> float | None:
    value = row.metrics.get(name, math.nan)
    return value if math.isfinite(value) else None


def _headline(row: RunRow, stage: str) -> float | None:
    return _metric(row, f"{stage}/{row.headline.name}")


def label_of(row: RunRow, names: Sequence[str]) -> str:
    """What sets a run apart, in the names that differ."""
    short = short_names(names)
    return ", ".join(f"{short[name]}={row.params.get(name, 'none')}" for name in names)


def bits_series(rows: Sequence[RunRow]) -> list[Series]:
    """The headline metric against weight bits (infinity: float weights), a series for all else that differs; empty
    unless there is something at two bitwidths."""
    differing = [name for name in differing_params(rows) if name != BITS]
    others = [name for name in differing if not name.startswith(REEST)]
    own = differing_params([row for row in rows if _headline(row, "reest") is not None])
    own = [name for name in own if name.startswith(REEST)]
    shown = [(bits, row) for row in ordered(rows) if (bits := bits_of(row)) is not None]
    series = []
    for label, members in _grouped([row for _, row in shown], others).items():
        widths = {bits: [row for row in members if bits_of(row) == bits] for bits, _ in shown}
        pairs = {(bits, value) for bits, same in widths.items() for value in fair_before(same)}
        after = {
            how: _points({(bits_of(row) or 0.0, _headline(row, "reest")) for row in same})
            for how, same in _grouped(members, own).items()
        }
        series.append(Series(label, _points(pairs), {how: points for how, points in after.items() if points}))
    return [one for one in series if one.before or one.after] if len(_bits(series)) > 1 else []


def _bits(series: Sequence[Series]) -> list[float]:
    return sorted({x for one in series for points in (one.before, *one.after.values()) for x, _ in points})


def batches_series(rows: Sequence[RunRow]) -> list[Series]:
    """The headline metric after re-estimation against its batches; ``before`` is at 0. Empty unless there is
    something at two numbers of batches."""
    others = [name for name in differing_params(rows) if name != BATCHES]
    series = []
    for label, members in _grouped(ordered(rows), others).items():
        counted = [(count, row) for row in members if (count := number(row.params.get(BATCHES)))]
        points = _points({(count, _headline(row, "reest")) for count, row in counted})
        if points:
            series.append(Series(label, _points({(0.0, value) for value in fair_before(members)}), {"": points}))
    return series if len({x for one in series for x, _ in one.after[""]}) > 1 else []


def size_points(rows: Sequence[RunRow]) -> list[SizePoint]:
    """Folded networks by size; empty unless two sizes differ."""
    names = differing_params(rows)
    found = []
    for row in ordered(rows):
        folded, exported, size = _headline(row, "fold"), _headline(row, "export"), _metric(row, SIZE)
        value = exported if folded is None else folded
        if value is not None and size is not None:
            found.append(SizePoint(size, value, label_of(row, names)))
    return found if len({round(point.megabytes, 3) for point in found}) > 1 else []


def pareto_front(points: Sequence[SizePoint], higher_is_better: bool = True) -> list[SizePoint]:
    """The points that no other one beats in size and value at once, the smallest first."""
    front: list[SizePoint] = []
    sign = 1 if higher_is_better else -1
    for point in sorted(points, key=lambda p: (p.megabytes, -sign * p.value)):
        if not front or sign * point.value > sign * front[-1].value:
            front.append(point)
    return front


def _grouped(rows: Sequence[RunRow], names: Sequence[str]) -> dict[str, list[RunRow]]:
    groups: dict[str, list[RunRow]] = {}
    for row in rows:
        groups.setdefault(label_of(row, names), []).append(row)
    return groups


def _points(pairs: set[tuple[float, float | None]]) -> Points:
    return sorted((x, y) for x, y in pairs if y is not None and math.isfinite(y))


def save_plots(rows: Sequence[RunRow], folder: Path, stages: Mapping[str, str]) -> list[Path]:
    """Write the plots that the runs have data for, each as PNG and SVG, to a folder that is made if need be; returns
    the files. stages: headings by their names in metrics. Runs of another headline metric get plots of their own."""
    headlines = dict.fromkeys(row.headline for row in rows)
    return [
        path
        for headline in headlines
        for path in _save_plots([row for row in rows if row.headline == headline], folder, stages, headline)
    ]


def _save_plots(rows: Sequence[RunRow], folder: Path, stages: Mapping[str, str], headline: Headline) -> list[Path]:
    drawn: list[tuple[str, str, Callable[[Any], None]]] = []
    fp32 = {value for row in rows if (value := _headline(row, "fp32")) is not None}
    line = fp32.pop() if len(fp32) == 1 else None
    bits, batches, sizes = bits_series(rows), batches_series(rows), size_points(rows)
    if bits:
        what = "before and after BN re-estimation, by weight bits"
        drawn.append(("bits", what, lambda axes: _draw_bits(axes, bits, line)))
    if batches:
        what = "after BN re-estimation, by number of batches"
        drawn.append(("batches", what, lambda axes: _draw_batches(axes, batches, line)))
    if sizes:
        what = "by model size; filled: no other network is both smaller and better"
        drawn.append(("size", what, lambda axes: _draw_sizes(axes, sizes, headline.higher_is_better)))
    staged = [row for row in ordered(rows) if any(_headline(row, stage) is not None for stage in stages)]
    if not drawn and len(staged) > 1:
        first = f", the first {MOST_RUNS} of {len(staged)} runs" if len(staged) > MOST_RUNS else ""
        drawn.append(("stage", f"stage by stage{first}", lambda axes: _draw_stages(axes, staged, stages)))
    return [
        path
        for kind, what, draw in drawn
        for path in _save(draw, folder, f"{headline.name}_by_{kind}", headline.label, what)
    ]


def _save(draw: Callable[[Any], None], folder: Path, name: str, label: str, what: str) -> list[Path]:
    import matplotlib  # late: the import takes long
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "bnre_exp", "font.size": 10, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes: Any = figure.subplots()
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        draw(axes)
        axes.margins(y=0.07)
        title = f"{as_beginning(label)} {what}"
        axes.set_title(title)
        axes.set_ylabel(f"{label} on the test data")
        entries = len(axes.get_legend_handles_labels()[1])
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
        figure.set_figheight(max(5.0, 0.19 * entries + 1))
        paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None, "Title": title})
    return paths


def as_beginning(label: str) -> str:
    """The label of a metric where a title begins with it: Top-1, and mIoU as it is."""
    return f"{label[:1].upper() if label[:2].islower() else label[:1]}{label[1:]}"


def _style(number: int) -> dict[str, Any]:
    # the markers move on with every round of the colours: the eighth series does not look like the first
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markersize": 6}


def _draw_fp32(axes: Any, value: float | None) -> None:
    if value is not None:
        axes.axhline(value, color="#777777", linewidth=1, zorder=1, label=f"FP32, {value:.4f}")


def _draw_bits(axes: Any, series: Sequence[Series], fp32: float | None) -> None:
    _draw_fp32(axes, fp32)
    ticks = _bits(series)  # at equal distances: 8 bits and float weights are no further away than 4
    several = len(series) > 1
    n = 0
    for one in series:
        name = f"{one.label}: " if one.label else ""
        lines = [("before", one.before)] if one.before else []
        lines += [(f"after{', ' if how else ''}{how}", points) for how, points in one.after.items()]
        for place, (what, points) in enumerate(lines):
            hollow = {"markerfacecolor": "white", "linestyle": "--"} if what == "before" else {}
            style = {**_style(n), **hollow, "label": f"{name}{what}"}
            axes.plot([ticks.index(x) for x, _ in points], [y for _, y in points], **style)
            n += what != "before" and (not several or place == len(lines) - 1 or len(one.after) > 1)
        n += not one.after
    axes.set_xticks(range(len(ticks)), ["float" if math.isinf(x) else f"{x:g}" for x in ticks])
    axes.set_xlabel("bits of weights")


def _draw_batches(axes: Any, series: Sequence[Series], fp32: float | None) -> None:
    _draw_fp32(axes, fp32)
    for n, one in enumerate(series):
        name = f"{one.label}: " if one.label else ""
        axes.plot(*zip(*one.after[""]), **_style(n), label=f"{name}re-estimated")
        for _, value in one.before:
            colour = COLOURS[n % len(COLOURS)]
            axes.axhline(value, color=colour, linestyle="--", linewidth=1.2, label=f"{name}before, {value:.4f}")
    ticks = sorted({x for one in series for x, _ in one.after[""]})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("batches of re-estimation")


def _draw_sizes(axes: Any, points: Sequence[SizePoint], higher_is_better: bool) -> None:
    front = pareto_front(points, higher_is_better)
    axes.step(*zip(*[(p.megabytes, p.value) for p in front]), where="post", color="#777777", linewidth=1, zorder=1)
    for n, point in enumerate(points):
        # as good as one of the front is good, too: of two equal ones neither beats the other
        is_best = any((point.megabytes, point.value) == (best.megabytes, best.value) for best in front)
        style = {**_style(n), "markerfacecolor": COLOURS[n % len(COLOURS)] if is_best else "white", "markersize": 7}
        axes.plot([point.megabytes], [point.value], linestyle="none", **style, label=point.label)
    axes.set_xlabel("size of the folded network [MB], codes at their bitwidth")


def _draw_stages(axes: Any, rows: Sequence[RunRow], stages: Mapping[str, str]) -> None:
    names = differing_params(rows)
    shown = rows[:MOST_RUNS]
    used = [
        (stage, label) for stage, label in stages.items() if any(_headline(row, stage) is not None for row in shown)
    ]
    for n, row in enumerate(shown):
        found = [(x, _headline(row, stage)) for x, (stage, _) in enumerate(used)]
        points = [(x, y) for x, y in found if y is not None]
        axes.plot(*zip(*points), **_style(n), label=label_of(row, names) or row.name)
    axes.set_xticks(range(len(used)), [label for _, label in used])
