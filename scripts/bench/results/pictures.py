"""Two pictures: top-1 by scheme, and by the number of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from scripts.bench.results.cases import NETWORKS, SCHEMES

# Okabe and Ito, "Color universal design", 2008: told apart by people who see colours differently.
BEFORE, AFTER, MINMAX, MINMAX_AFTER, AIMET, AIMET_AFTER = (
    "#A6D3EF", "#0072B2", "#F0C9AE", "#D55E00", "#CFCFCF", "#707070",
)  # fmt: skip
FINE, COARSE = (8, 8.5, 9, 9.5, 10, 10.5, 11, 12, 13, 15, 17, 20), (9, 10, 12, 15, 20, 30, 50, 90)  # [%], of the axis
PTQ = {
    "quantized, MSE": ("ptq", "recal_only", BEFORE), "re-estimated": ("ptq", "reest", AFTER),
    "quantized, min-max": ("ptq minmax", "recal_only", MINMAX), "re-estimated ": ("ptq minmax", "reest", MINMAX_AFTER),
    "AIMET": ("aimet", "ptq", AIMET), "AIMET, re-estimated": ("aimet", "recalibrated", AIMET_AFTER),
}  # fmt: skip
QAT = {
    "from re-estimated": ("qat", "qat", BEFORE), "re-estimated": ("qat", "reest", AFTER),
    "from nothing": ("qat none", "qat", MINMAX), "re-estimated ": ("qat none", "reest", MINMAX_AFTER),
    "AIMET, as documented": ("aimet qat", "qat", AIMET), "AIMET, re-estimated": ("aimet qat", "reest", AIMET_AFTER),
}  # fmt: skip


LINES = dict(zip(SCHEMES, ("#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=True))


def draw(known: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """The pictures, in ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}_batches.png"]
    for path, figure in zip(paths, (_errors(known), _curves(known)), strict=True):
        figure.savefig(path, dpi=110)
    return paths


def _errors(known: Mapping[str, Any]) -> Figure:
    figure, networks, panels = _panels(known["values"], 3.4)
    for axes, network in zip(panels, networks, strict=True):
        values = known["values"][network]
        schemes = [scheme for scheme in SCHEMES if scheme in values]
        for panel, title, shown in zip(axes, ("without QAT", "QAT of 100 steps"), (PTQ, QAT), strict=True):
            for index, (label, (job, row, colour)) in enumerate(shown.items()):
                found = [[100 * value for value in values[scheme][job][row]] for scheme in schemes]
                places = [place + (index - 2.5) * 0.13 for place in range(len(schemes))]
                panel.errorbar(places, [100 - mean(some) for some in found], [_deviation(some) for some in found],
                               fmt="o", color=colour, label=label)  # fmt: skip
            fp32 = mean(value for scheme in schemes for value in values[scheme]["ptq"]["fp32"])
            panel.axhline(100 - 100 * fp32, color="black", linestyle=":", linewidth=1)
            panel.set(title=f"{NETWORKS[network]}, {title}", ylabel="top-1 error [%], dotted: FP32", yscale="log")
            low, high = panel.get_ylim()
            ticks = COARSE if high > 2 * low else FINE
            panel.set_yticks(ticks, map(str, ticks))
            panel.set_ylim(low, high)
            panel.minorticks_off()
            panel.set_xticks(range(len(schemes)), [scheme.upper() for scheme in schemes])
            panel.spines[["top", "right"]].set_visible(False)
            if network == networks[-1]:
                panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False, fontsize=9)
    return figure


def _curves(known: Mapping[str, Any]) -> Figure:
    figure, networks, panels = _panels(known["curves"], 3.2)
    for axes, network in zip(panels, networks, strict=True):
        for panel, title, job in zip(axes, ("without QAT", "after QAT"), ("ptq", "qat"), strict=True):
            for scheme, jobs in known["curves"][network].items():
                counts = sorted(filter(None, map(int, jobs[job])))
                found = [[100 * value for value in jobs[job][str(count)]] for count in counts]
                panel.errorbar(counts, [mean(some) for some in found], [_deviation(some) for some in found],
                               marker="o", markersize=4, linewidth=1.2, label=scheme.upper(),
                               color=LINES[scheme])  # fmt: skip
                if "0" in jobs[job]:
                    panel.axhline(100 * mean(jobs[job]["0"]), color=LINES[scheme], linestyle=":", linewidth=1)
            panel.set(
                title=f"{NETWORKS[network]}, {title}", xscale="log", xlabel="batches", ylabel="validation top-1 [%]"
            )
            panel.set_xticks(counts, map(str, counts))
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False, fontsize=9)
    return figure


def _panels(measured: Mapping[str, Any], height: float) -> tuple[Figure, list[str], Any]:
    """A figure, the networks that are measured, and a row of two panels for each. height: of a row [inch]."""
    networks = [network for network in NETWORKS if network in measured]
    figure = Figure(figsize=(12, height * len(networks)), layout="constrained")
    return figure, networks, figure.subplots(len(networks), 2, squeeze=False)


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
