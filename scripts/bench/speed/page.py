"""The page: ratios beside their goals, medians with their spread, peak memory, and what each contender does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.bench.speed.case import CALIBRATE_8, EVALUATE, QAT, REESTIMATE, STEPS
from scripts.bench.speed.machine import sentence
from scripts.bench.speed.measure import median
from scripts.bench.speed.words import CONTENDERS, HOW, NOT_THE_SAME

WEIGHTS = "ours, weights only"
# What is divided by what, and the goal. Steps' seconds, but for those with "bytes", which are peak memory.
RATIOS: tuple[tuple[str, str, tuple[str, str], tuple[str, str], str], ...] = (
    ("QAT step, ours / FP32", "≤ 1.3", (QAT, "ours"), (QAT, "FP32"), "seconds"),
    ("QAT step, ours compiled / FP32", "≤ 1.15", (QAT, "ours, compiled"), (QAT, "FP32"), "seconds"),
    ("QAT step, AIMET / ours", "≥ 2.5 (mobilenet_v2), ≥ 1.5 (resnet18)", (QAT, "AIMET"), (QAT, "ours"), "seconds"),
    ("QAT step, AIMET in channels-last / ours", "", (QAT, "AIMET, channels-last"), (QAT, "ours"), "seconds"),
    ("QAT step, Brevitas / ours", "", (QAT, "Brevitas"), (QAT, "ours"), "seconds"),
    ("re-estimation batch, ours / FP32 forward in training mode", "≤ 1.15", (REESTIMATE, "ours"),
     (REESTIMATE, "FP32"), "seconds"),
    ("re-estimation batch, weights alone quantized / FP32 forward in training mode", "≤ 1.05", (REESTIMATE, WEIGHTS),
     (REESTIMATE, "FP32"), "seconds"),
    ("re-estimation batch, AIMET / ours", "≥ 3.0 (mobilenet_v2), ≥ 2.2 (resnet18)", (REESTIMATE, "AIMET"),
     (REESTIMATE, "ours"), "seconds"),
    ("re-estimation batch, AIMET in channels-last / ours", "", (REESTIMATE, "AIMET, channels-last"),
     (REESTIMATE, "ours"), "seconds"),
    ("re-estimation batch, Brevitas / ours", "", (REESTIMATE, "Brevitas"), (REESTIMATE, "ours"), "seconds"),
    ("evaluation batch, ours / FP32", "≤ 1.2", (EVALUATE, "ours"), (EVALUATE, "FP32"), "seconds"),
    ("evaluation batch, AIMET / ours", "", (EVALUATE, "AIMET"), (EVALUATE, "ours"), "seconds"),
    ("calibration with 8 batches, ours / 8 FP32 forward passes", "≤ 2", (CALIBRATE_8, "ours"),
     (CALIBRATE_8, "FP32"), "seconds"),
    ("peak memory of a QAT step, ours / FP32", "≤ 1.35", (QAT, "ours"), (QAT, "FP32"), "bytes"),
    ("peak memory of a QAT step, AIMET / ours", "", (QAT, "AIMET"), (QAT, "ours"), "bytes"),
)  # fmt: skip

Rows = Sequence[Mapping[str, Any]]


def ratios_of(contenders: Sequence[str]) -> list[Any]:
    """RATIOS, and for everything that ours was computed in beside (compiled, bfloat16) what it brings."""
    found: list[Any] = list(RATIOS)
    for name in contenders:
        how = name.removeprefix("ours")
        if name.startswith("ours, ") and name != WEIGHTS:
            for step, other in itertools.product((QAT, REESTIMATE, EVALUATE), (f"FP32{how}", "ours")):
                found.append((f"{step}, {name} / {other}", "", (step, name), (step, other), "seconds"))
    return found


def value_of(rows: Rows, step: str, contender: str, unit: str) -> float | None:
    """A contender's median seconds, or its peak bytes, of a step; None where there is no such figure."""
    for row in rows:
        if (row["step"], row["contender"]) == (step, contender) and row.get(unit):
            return median(row) if unit == "seconds" else float(row[unit])
    return None


def ratio_of(rows: Rows, above: tuple[str, str], below: tuple[str, str], unit: str) -> float | None:
    """The quotient of two such figures, None where either is missing."""
    values = [value_of(rows, *place, unit) for place in (above, below)]
    return None if None in values else values[0] / values[1]  # type: ignore[operator]


def markdown(results: Mapping[str, Any], picture: str, scaling: str | None) -> str:
    """The whole page from what was measured."""
    cases, names = results["cases"], results["contenders"]
    lines = ["# Speed and memory beside other libraries", "", HOW.format(machine=sentence(results["machine"])), ""]
    lines += ["```bash", results["command"], "```", ""]
    lines += [line for caveat in _caveats(results) for line in (f"**{caveat}**", "")]
    lines += [*_left_out(results), "## Ratios", ""]
    lines += _ratio_table(cases, names)
    lines += ["", f"![seconds of each contender over those of the FP32 network]({picture})", ""]
    if scaling is not None:
        lines += [f"![how seconds grow with batches, channels and depth]({scaling})", ""]
    lines += ["## What each does", "", CONTENDERS, "", NOT_THE_SAME, ""]
    lines += ["## Seconds and memory", "", "Medians, with the smallest and the largest in brackets.", ""]
    for case in cases:
        lines += [f"### {case['name']}", "", *_table(case["timings"], names, _seconds, "seconds")]
        if any("bytes" in row for row in case["memory"]):
            lines += ["", *_table(case["memory"], names, _mebibytes, "peak MiB above the idle process")]
        lines += [*_errors([*case["timings"], *case["memory"]]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _caveats(results: Mapping[str, Any]) -> list[str]:
    """Why the figures are not to be relied on, if they are not."""
    found, load, cores = [], results["machine"]["load before"] or 0.0, results["machine"]["cores"]
    if results["is_quick"]:
        found.append("These figures are rough: a quick run, of one round.")
    if load > cores / 2:
        found.append(f"The machine was busy with other work (a load of {load:.0f} on {cores} cores): seconds and their "
                     "ratios are not to be relied on, memory is.")  # fmt: skip
    return found


def _left_out(results: Mapping[str, Any]) -> list[str]:
    lines = [f"- {name} could not be imported, so its column is left out ({why})." for name, why in
             results["missing"].items()]  # fmt: skip
    lines += [f"- {note}" for note in results["notes"]]
    return [*lines, ""] if lines else []


def _ratio_table(cases: Sequence[Mapping[str, Any]], contenders: Sequence[str]) -> list[str]:
    lines = [f"| | {' | '.join(case['name'] for case in cases)} | goal |", f"|---|{'--:|' * len(cases)}---|"]
    for name, goal, above, below, unit in ratios_of(contenders):
        rows = "timings" if unit == "seconds" else "memory"
        values = [ratio_of(case[rows], above, below, unit) for case in cases]
        if any(value is not None for value in values):
            cells = ["–" if value is None else f"{value:.2f}" for value in values]
            lines.append(f"| {name} | {' | '.join(cells)} | {goal} |")
    return lines


def _table(rows: Rows, names: Sequence[str], cell: Any, unit: str) -> list[str]:
    contenders = [name for name in names if any(row["contender"] == name for row in rows)]
    cells = {(row["step"], row["contender"]): "fails" if "error" in row else cell(row) for row in rows}
    lines = [f"| {unit} | {' | '.join(contenders)} |", f"|---|{'--:|' * len(contenders)}"]
    for step in STEPS:
        if any((step, name) in cells for name in contenders):
            lines.append(f"| {step} | {' | '.join(cells.get((step, name), '–') for name in contenders)} |")
    return lines


def _seconds(row: Mapping[str, Any]) -> str:
    low, high = min(row["seconds"]), max(row["seconds"])
    return f"{_short(median(row))} ({_short(low)}–{_short(high)})" if low < high else _short(low)


def _short(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _mebibytes(row: Mapping[str, Any]) -> str:
    return f"{row['bytes'] / 2**20:.0f}"


def _errors(rows: Rows) -> list[str]:
    found = dict.fromkeys((row["contender"], row["step"], row["error"]) for row in rows if "error" in row)
    lines = [f"- {contender}, {step}: `{error.replace('`', chr(39))}`" for contender, step, error in found]
    return ["", "What fails:", "", *lines] if lines else []
