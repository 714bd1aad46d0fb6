"""The page of results, as Markdown: mean and standard deviation over seeds, in percent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from scripts.bench.results.cases import (
    BATCH_SIZE,
    BATCHES,
    CONTROL,
    CONTROLLED,
    CURVE,
    NETWORKS,
    PRIOR_BATCHES,
    QAT_LR,
    SCHEMES,
    TOLERANCE,
)

Known = Mapping[str, Any]
Row = list[str]
NAMES = {scheme: scheme.upper() for scheme in SCHEMES}


def markdown(known: Known, images: Sequence[str]) -> str:
    """The whole page. images: paths of the pictures, as the page links them."""
    parts = [_intro(known, images)]
    for network, heading in NETWORKS.items():
        if network in known["values"]:
            cells = Cells(known, network)
            parts += [f"## {heading}", *_without_qat(cells), *_with_qat(cells), *_estimators(cells)]
    return "\n\n".join([*parts, _points(known)]) + "\n"


def _intro(known: Known, images: Sequence[str]) -> str:
    bars, curves = images
    failures = "; ".join(f"{NETWORKS[network]}: {said}" for network, said in known["aimet_fold"].items())
    return f"""# Results: what re-estimation brings, and what else does

![top-1 by scheme, before and after re-estimation]({bars})

Fashion-MNIST at 28×28, the whole test set (10 000 images), top-1 in percent: mean ± standard deviation over the
seeds, whose number is in brackets. Made by `{known["command"]}`
(torch {known["torch"]}, {known["machine"]}, CPU). FP32 is trained for {known["epochs"]} epochs on 54 000 images; all
that follows draws from 12 902 of them: {BATCHES} batches of {BATCH_SIZE} re-estimate, and QAT is an epoch of {BATCHES}
steps (SGD, peak of {QAT_LR}, cosine). Weights are quantized per channel with MSE ranges on the narrow grid, unless a
table says otherwise, activations per tensor. Ranges that are calibrated twice under the same statistics are the same,
so that `calibrate` and `none` may be one here.

A *change* is on the same test images; *sure in 2 of 3* says in how many seeds McNemar's test tells it apart from none
(95 %).

**AIMET** {known["aimet"]} has the same FP32 weights, the same batches in the same order, as many steps, the same rates
and schedule, and its own ranges (`training_range_learning_with_tf_init`: minimum and maximum, learned in QAT) and grid
(full). *As documented*: calibrated, trained, re-estimated. *Prepared*: re-estimated and calibrated before QAT, as ours
is by default. Its `fold_all_batch_norms_to_scale` says of {failures}. Ours is exact but for the rounding of biases.

![validation top-1 by number of batches]({curves})"""


def _without_qat(cells: Cells) -> Iterator[str]:
    yield _table(
        "### Without QAT",
        ["scheme (seeds)", "FP32", "quantized", "recalibrated only", "re-estimated", "pooled",
         f"prior of {PRIOR_BATCHES} batches", "folded", "change by re-estimation"],
        ([name, cells("ptq", "fp32"), cells("ptq", "ptq"), cells("ptq", "recal_only"), cells("ptq", "reest"),
          cells("ptq pooled", "reest"), cells("ptq prior", "reest"), cells("ptq", "fold"), cells.change("ptq")]
         for name in cells.schemes()),
    )  # fmt: skip
    yield _table(
        "### Which range estimator, and AIMET, without QAT\n\nBefore → after re-estimation and new activation ranges.",
        ["scheme", "MSE", "min-max", "AIMET", "AIMET, as documented (ranges stay)", "ours (MSE) less AIMET",
         "ours (min-max) less AIMET"],
        ([name, cells.pair("ptq", "recal_only", "reest"), cells.pair("ptq minmax", "recal_only", "reest"),
          cells.pair("aimet", "ptq", "recalibrated"), cells("aimet", "reest"), cells.change("aimet recalibrated"),
          cells.change("aimet minmax")]
         for name in cells.schemes()),
    )  # fmt: skip


def _with_qat(cells: Cells) -> Iterator[str]:
    yield _table(
        "### QAT, by what is done before it (`qat.prepare`)\n\nQAT → re-estimated; in brackets what QAT starts from.",
        ["scheme", "re-estimated, no QAT", "reestimate (default)", "calibrate", "none", "change by re-estimation",
         "QAT less no QAT"],
        ([name, cells("qat", "reest_only"), cells.from_start("qat"), cells.from_start("qat calibrate"),
          cells.pair("qat none", "qat", "reest"), cells.change("qat"), cells.change("qat beside re-estimation alone")]
         for name in cells.schemes()),
    )  # fmt: skip
    yield _table(
        "### QAT beside AIMET\n\nQAT → re-estimated.",
        ["scheme", "ours, none", "AIMET, as documented", "difference", "ours, reestimate", "AIMET, prepared",
         "difference"],
        ([name, cells.pair("qat none", "qat", "reest"), cells.pair("aimet qat", "qat", "reest"),
          cells.change("aimet qat"), cells.pair("qat", "qat", "reest"),
          cells.pair("aimet qat prepared", "qat", "reest"), cells.change("aimet qat prepared")]
         for name in cells.schemes()),
    )  # fmt: skip
    yield _table(
        "### QAT with BN frozen, other momenta, oscillation freezing\n\nQAT → re-estimated.",
        ["scheme", "momentum 0.1 (default)", *(name.removeprefix("qat ") for name in CONTROL)],
        ([NAMES[scheme], *(cells.at(scheme).pair(job, "qat", "reest") for job in ("qat", *CONTROL))]
         for scheme in CONTROLLED if cells.at(scheme).is_there),
    )  # fmt: skip


def _estimators(cells: Cells) -> Iterator[str]:
    yield _table(
        f"### How many batches are enough: `reest.tolerance={TOLERANCE}`",
        ["scheme", "batches, no QAT", f"change against {BATCHES}", "batches, after QAT", f"change against {BATCHES}"],
        ([name, cells.count("ptq tolerance"), cells.change("ptq tolerance"), cells.count("qat tolerance"),
          cells.change("qat tolerance")] for name in cells.schemes()),
    )  # fmt: skip
    yield _table(
        "By number of batches, on the validation images (1434):",
        ["scheme", "0", *map(str, CURVE)],
        ([f"{name}{said}", *cells.curve(job)] for name in cells.schemes() for job, said in
         (("ptq", ""), ("qat", ", after QAT"))),
    )  # fmt: skip
    yield _table(
        "### 32 images, and `pooled`",
        ["scheme", "quantized", "32 images", "32 images, prior of 32", f"{BATCHES} batches",
         "change by pooled, no QAT", "change by pooled, after QAT"],
        ([name, cells("ptq", "ptq"), cells("ptq 32 images", "reest"), cells("ptq 32 images prior", "reest"),
          cells("ptq", "reest"), cells.change("pooled"), cells.change("qat pooled")] for name in cells.schemes()),
    )  # fmt: skip
    yield _table(
        "### `quant.weight_grid=full`\n\nQuantized → re-estimated without QAT; QAT → re-estimated with it.",
        ["scheme", "narrow", "full", "change", "narrow, QAT", "full, QAT", "change"],
        ([name, cells.pair("ptq", "ptq", "reest"), cells.pair("ptq full grid", "ptq", "reest"),
          cells.change("ptq full grid"), cells.pair("qat", "qat", "reest"), cells.pair("qat full grid", "qat", "reest"),
          cells.change("qat full grid")] for name in cells.schemes()),
    )  # fmt: skip


class Cells:
    """The cells of a network's tables, of one scheme at a time."""

    def __init__(self, known: Known, network: str) -> None:
        self._known, self._network, self._scheme = known, network, SCHEMES[0]

    def at(self, scheme: str) -> Cells:
        self._scheme = scheme
        return self

    @property
    def is_there(self) -> bool:
        return bool(self._of("values"))

    def schemes(self) -> Iterator[str]:
        """The headings of rows; meanwhile cells are of that scheme."""
        for scheme in SCHEMES:
            if self.at(scheme).is_there:
                yield f"{NAMES[scheme]} ({len(self._known['seeds'][self._network][scheme])})"

    def __call__(self, job: str, row: str) -> str:
        return spread([100 * value for value in self._of("values")[job][row]])

    def pair(self, job: str, before: str, after: str) -> str:
        return f"{self(job, before)} → {self(job, after)}"

    def from_start(self, job: str) -> str:
        return f"({self(job, 'qat_start')}) {self.pair(job, 'qat', 'reest')}"

    def count(self, job: str) -> str:
        return " to ".join(dict.fromkeys(f"{f(self._of('metrics')[job]['reest/batches']):.0f}" for f in (min, max)))

    def curve(self, job: str) -> list[str]:
        found = self._of("curves")[job]
        values = [found.get(str(count)) for count in (0, *CURVE)]
        return ["–" if some is None else spread([100 * value for value in some]) for some in values]

    def change(self, name: str) -> str:
        """The change over seeds, and in how many it is sure."""
        tests = self._of("tests")[name]
        changes = [100 * test["change"] for test in tests]
        sure = sum(test["sure"] for test in tests)
        return f"{spread(changes, '+.2f')}, sure in {sure} of {len(tests)}"

    def _of(self, what: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._known[what].get(self._network, {}).get(self._scheme, {})
        return found


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and, of more than one, standard deviation."""
    return f"{mean(values):{form}}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _table(title: str, headings: Sequence[str], rows: Iterator[Row]) -> str:
    lines = [f"| {' | '.join(headings)} |", "|---" + "|--:" * (len(headings) - 1) + "|"]
    return title + "\n\n" + "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _points(known: Known) -> str:
    """Where ours is below AIMET, by the figures."""
    named = {
        "aimet recalibrated": "without QAT, MSE ranges",
        "aimet minmax": "without QAT, min-max ranges",
        "aimet qat": "QAT from none, AIMET as documented",
        "aimet qat prepared": "QAT from re-estimated statistics",
    }
    lines = []
    for network, by_scheme in known["tests"].items():
        for scheme, tests in by_scheme.items():
            for name, said in named.items():
                changes = [100 * test["change"] for test in tests[name]]
                worse = sum(test["sure"] and test["change"] < 0 for test in tests[name])
                if mean(changes) < 0:
                    told = f"{spread(changes, '+.2f')}, sure in {worse} of {len(changes)}"
                    lines.append(f"- {NETWORKS[network]}, {NAMES[scheme]}, {said}: {told}")
    head = "## Where AIMET is above ours\n\n"
    return head + ("\n".join(lines) if lines else "Nowhere, on average over the seeds.")
