"""Plots of a comparison, as PNG and SVG that need nothing to be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from bnre_exp.report.comparison import RunRow, differing_params, number, ordered, short_names

BITS, BATCHES, SIZE = "quant.weight_bits", "reest.num_batches", "fold/megabytes"
REEST = ("reest.",)  # what belongs to re-estimation itself
# Okabe and Ito, "Color universal design", 2008: told apart by people who see colours differently.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STAGES = (
    ("fp32/top1", "FP32"),
    ("ptq/top1", "quantized"),
    ("qat/top1", "QAT"),
    ("reest/top1", "re-estimated"),
    ("fold/top1", "folded"),
)
MOST_SERIES = 14

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """Runs that differ in nothing else. before: ``(x, top-1)`` without re-estimated statistics, ascending in x; after:
    the same with them, by what sets them apart among themselves."""

    label: str
    before: Points
    after: dict[str, Points]


@dataclass(frozen=True)
class SizePoint:
    """A folded network: megabytes, top-1, and what it is called."""

    megabytes: float
    top1: float
    label: str


def before(row: RunRow) -> Optional[float]:
    """Top-1 of what re-estimation starts from: recalibrated only, else after QAT, else quantized."""
    for name in ("recal_only/top1", "qat/top1", "ptq/top1"):
        if name in row.metrics:
            return row.metrics[name]
    return None


def label_of(row: RunRow, names: Sequence[str]) -> str:
    """What sets a run apart, in the names that differ."""
    short = short_names(names)
    return ", ".join(f"{short[name]}={row.params.get(name, 'none')}" for name in names)


def bits_series(rows: Sequence[RunRow]) -> list[Series]:
    """Top-1 against weight bits, a series for all else that differs; empty unless there are two bitwidths."""
    differing = [name for name in differing_params(rows) if name != BITS]
    others = [name for name in differing if not name.startswith(REEST)]
    own = differing_params([row for row in rows if "reest/top1" in row.metrics])
    own = [name for name in own if name.startswith(REEST)]
    shown = [row for row in ordered(rows) if number(row.params.get(BITS)) is not None]
    if len({row.params[BITS] for row in shown}) < 2:
        return []
    series = []
    for label, members in _grouped(shown, others).items():
        pairs = {(float(row.params[BITS]), before(row)) for row in members}
        after = {
            how: _points({(float(row.params[BITS]), row.metrics.get("reest/top1")) for row in same})
            for how, same in _grouped(members, own).items()
        }
        series.append(Series(label, _points(pairs), {how: points for how, points in after.items() if points}))
    return [one for one in series if one.before or one.after]


def batches_series(rows: Sequence[RunRow]) -> list[Series]:
    """Top-1 after re-estimation against its batches; ``before`` has one point, at 0. Empty unless numbers differ."""
    others = [name for name in differing_params(rows) if name != BATCHES]
    if len({row.params.get(BATCHES) for row in rows if number(row.params.get(BATCHES))}) < 2:
        return []
    series = []
    for label, members in _grouped(ordered(rows), others).items():
        after = {(float(row.params[BATCHES]), row.metrics.get("reest/top1")) for row in members}
        start = next((value for row in members if (value := before(row)) is not None), None)
        points = _points(after)
        if points:
            series.append(Series(label, _points({(0.0, start)}), {"": points}))
    return series


def size_points(rows: Sequence[RunRow]) -> list[SizePoint]:
    """Folded networks by size; empty unless two sizes differ."""
    names = differing_params(rows)
    found = []
    for row in ordered(rows):
        top1 = row.metrics.get("fold/top1", row.metrics.get("export/top1", math.nan))
        size = row.metrics.get(SIZE, math.nan)
        if math.isfinite(top1) and math.isfinite(size):
            found.append(SizePoint(size, top1, label_of(row, names)))
    return found if len({round(point.megabytes, 3) for point in found}) > 1 else []


def pareto_front(points: Sequence[SizePoint]) -> list[SizePoint]:
    """The points that no other one beats in size and accuracy at once, the smallest first."""
    front: list[SizePoint] = []
    for point in sorted(points, key=lambda p: (p.megabytes, -p.top1)):
        if not front or point.top1 > front[-1].top1:
            front.append(point)
    return front


def _grouped(rows: Sequence[RunRow], names: Sequence[str]) -> dict[str, list[RunRow]]:
    groups: dict[str, list[RunRow]] = {}
    for row in rows:
        groups.setdefault(label_of(row, names), []).append(row)
    return groups


def _points(pairs: set[tuple[float, Optional[float]]]) -> Points:
    return sorted((x, y) for x, y in pairs if y is not None and math.isfinite(y))


def save_plots(rows: Sequence[RunRow], folder: Path) -> list[Path]:
    """Write the plots that the runs have data for, each as PNG and SVG; returns the files."""
    drawn: list[tuple[str, Callable[[Any], None]]] = []
    fp32 = {row.metrics["fp32/top1"] for row in rows if "fp32/top1" in row.metrics}
    line = fp32.pop() if len(fp32) == 1 else None
    bits, batches, sizes = bits_series(rows), batches_series(rows), size_points(rows)
    if bits:
        drawn.append(("top1_by_bits", lambda axes: _draw_bits(axes, bits, line)))
    if batches:
        drawn.append(("top1_by_batches", lambda axes: _draw_batches(axes, batches, line)))
    if sizes:
        drawn.append(("top1_by_size", lambda axes: _draw_sizes(axes, sizes)))
    if not drawn and 2 <= len([row for row in rows if row.metrics]) <= MOST_SERIES:
        drawn.append(("top1_by_stage", lambda axes: _draw_stages(axes, ordered(rows))))
    return [path for name, draw in drawn for path in _save(draw, folder, name)]


def _save(draw: Callable[[Any], None], folder: Path, name: str) -> list[Path]:
    import matplotlib  # late: the import takes long
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "bnre_exp", "font.size": 10, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes: Any = figure.subplots()
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        draw(axes)
        axes.set_ylabel("top-1 on the test data")
        paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 6}


def _legend(axes: Any, series: int) -> None:
    if series > 6:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    else:
        axes.legend(loc="best", fontsize=9, frameon=True, framealpha=0.9, edgecolor="none")


def _draw_fp32(axes: Any, value: Optional[float]) -> None:
    if value is not None:
        axes.axhline(value, color="#777777", linewidth=1, zorder=1, label=f"FP32, {value:.4f}")


def _draw_bits(axes: Any, series: Sequence[Series], fp32: Optional[float]) -> None:
    _draw_fp32(axes, fp32)
    n = 0
    for one in series:
        name = f"{one.label}: " if one.label else ""
        if one.before:
            hollow = {**_style(n), "markerfacecolor": "white", "linestyle": "--"}
            axes.plot(*zip(*one.before), **hollow, label=f"{name}before re-estimation")
        for how, points in one.after.items():
            axes.plot(*zip(*points), **_style(n), label=f"{name}after re-estimation{', ' if how else ''}{how}")
            n += 1
        n += not one.after
    ticks = sorted({x for one in series for points in (one.before, *one.after.values()) for x, _ in points})
    axes.set_xticks(ticks, [f"{x:.0f}" for x in ticks])
    axes.set_xlabel("bits of weights")
    axes.set_title("Top-1 before and after BN re-estimation, by weight bits")
    _legend(axes, n + len(series))


def _draw_batches(axes: Any, series: Sequence[Series], fp32: Optional[float]) -> None:
    _draw_fp32(axes, fp32)
    for n, one in enumerate(series):
        name = f"{one.label}: " if one.label else ""
        axes.plot(*zip(*[p for p in one.after[""] if p[0] > 0]), **_style(n), label=f"{name}re-estimated")
        if one.before:
            value = one.before[0][1]
            colour = COLOURS[n % len(COLOURS)]
            axes.axhline(value, color=colour, linestyle="--", linewidth=1.2, label=f"{name}before, {value:.4f}")
    ticks = sorted({x for one in series for x, _ in one.after[""] if x > 0})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:.0f}" for x in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("batches of re-estimation")
    axes.set_title("Top-1 after BN re-estimation, by number of batches")
    _legend(axes, 2 * len(series))


def _draw_sizes(axes: Any, points: Sequence[SizePoint]) -> None:
    front = pareto_front(points)
    axes.step(*zip(*[(p.megabytes, p.top1) for p in front]), where="post", color="#777777", linewidth=1, zorder=1)
    for n, point in enumerate(points):
        is_best = point in front
        style = {**_style(n), "markerfacecolor": COLOURS[n % len(COLOURS)] if is_best else "white", "markersize": 7}
        axes.plot([point.megabytes], [point.top1], linestyle="none", **style, label=point.label)
    axes.set_xlabel("size of the folded network [MB], codes at their bitwidth")
    axes.set_title("Top-1 by model size; filled: no other network is both smaller and better")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _draw_stages(axes: Any, rows: Sequence[RunRow]) -> None:
    names = differing_params(rows)
    used = [(metric, label) for metric, label in STAGES if any(metric in row.metrics for row in rows)]
    for n, row in enumerate(rows):
        points = [(x, row.metrics[metric]) for x, (metric, _) in enumerate(used) if metric in row.metrics]
        if points:
            axes.plot(*zip(*points), **_style(n), label=label_of(row, names) or row.name)
    axes.set_xticks(range(len(used)), [label for _, label in used])
    axes.set_title("Top-1 stage by stage")
    _legend(axes, len(rows))
