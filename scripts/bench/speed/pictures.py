"""Two pictures: every contender over the FP32 network, and how seconds grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from scripts.bench.speed.case import EVALUATE, QAT, REESTIMATE
from scripts.bench.speed.measure import median
from scripts.bench.speed.page import value_of

# Okabe and Ito, "Color universal design", 2008: told apart by people who see colours differently.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000", "#999999", "#F0E442")
SHOWN = {QAT: "QAT step", REESTIMATE: "re-estimation batch", EVALUATE: "evaluation batch"}


def bars(results: Mapping[str, Any], path: Path) -> None:
    """Seconds over those of the FP32 network: a panel a step, a group of bars a network and shape."""
    cases = results["cases"]
    names = [name for name in results["contenders"] if name != "FP32"]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    figure = Figure(figsize=(13, 1.6 + 1.25 * len(cases)), layout="constrained")
    drawn: dict[str, Any] = {}
    for axes, (step, title) in zip(figure.subplots(1, len(SHOWN), sharey=True), SHOWN.items()):
        for place, case in enumerate(cases):
            found = [(name, value_of(case["timings"], step, name, "seconds")) for name in colours]
            floor = value_of(case["timings"], step, "FP32", "seconds")
            ratios = [(name, value / floor) for name, value in found if value is not None and floor]
            for index, (name, ratio) in enumerate(ratios):
                height = 0.8 / len(ratios)
                y = place - 0.4 + (index + 0.5) * height
                drawn[name] = axes.barh(y, ratio, 0.9 * height, color=colours[name])
                axes.text(ratio, y, f" {ratio:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=1, zorder=0)
        axes.set(title=title, xlabel="seconds / seconds of the FP32 network")
        axes.set_yticks(range(len(cases)), [case["name"].replace(", ", "\n") for case in cases])
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    drawn = {name: drawn[name] for name in names if name in drawn}
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=min(len(drawn) or 1, 6), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def growth(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Three panels: re-estimation by its number of batches, steps by channels, steps by depth."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = {"batches": "number of batches", "channels": "width of MobileNetV2", "depth": "network"}
    titles = ("re-estimation of MobileNetV2, the whole call", "a batch, by channels", "a batch, by depth")
    lines: dict[str, Any] = {}
    for axes, title, (along, label) in zip(figure.subplots(1, len(panels)), titles, panels.items()):
        of_panel = [row for row in rows if row["along"] == along and row.get("seconds")]
        for step, contender in dict.fromkeys((row["step"], row["contender"]) for row in of_panel):
            points = [row for row in of_panel if (row["step"], row["contender"]) == (step, contender)]
            is_ours = contender == "ours"
            (line,) = axes.plot(
                [row["at"] for row in points], [median(row) for row in points], marker="o" if is_ours else "s",
                linestyle="-" if is_ours else "--", color=COLOURS[0 if step == QAT else 2],
            )  # fmt: skip
            lines[f"{contender}, {'QAT step' if step == QAT else 're-estimation' if is_ours else 'forward pass'}"] = (
                line
            )
        axes.set(xlabel=label, ylabel="seconds", title=title)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
