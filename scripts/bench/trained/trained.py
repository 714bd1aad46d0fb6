#!/usr/bin/env python
"""Detectors, segmenters, a denoiser and a pose network, trained on digit_scenes, quantized, re-estimated and exported.

    python scripts/bench/trained/trained.py                      # all; about an hour on two cores
    python scripts/bench/trained/trained.py --network yolov8n --bits 4 --epochs 1     # a try

Needs the extras ultralytics and bench. Every job goes through the runner; its stages are in the stage store, so that an
interrupted run goes on where it was. Writes OUTPUT.md, OUTPUT.json and a picture in the folder images beside them;
--render makes the page and the picture again from OUTPUT.json.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

SCRIPTS, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[3]
sys.path[:0] = [str(SCRIPTS), str(ROOT)]

from bnre_exp.cli.compose import compose_config  # noqa: E402
from bnre_exp.jobs.run import run  # noqa: E402
from bnre_exp.tasks import Evaluation  # noqa: E402

CUSTOM = "model=custom"
SEGMENTATION = ("task=segmentation", "task.kwargs.loss=dice_cross_entropy", "dataset.batch_size=16")
NETWORKS = {  # heading, task, overrides, epochs
    "yolov8n": ("YOLOv8n", ["model=ultralytics", "model.name=yolov8n", "task=ultralytics"], 20),
    "fcos": (
        "FCOS, ResNet18",
        [CUSTOM, "model._target_=networks.fcos", "task=detection", "model.submodules=[backbone, head]"],
        12,
    ),
    "unet": ("U-Net, MobileNetV2", [CUSTOM, "model._target_=networks.unet", *SEGMENTATION], 20),
    "deeplabv3plus": (
        "DeepLabV3+, MobileNetV2", [CUSTOM, "model._target_=networks.deeplabv3plus", *SEGMENTATION], 15,
    ),
    "dncnn": ("DnCNN", [CUSTOM, "model._target_=networks.DnCNN", "task=regression"], 5),
    "pose": ("pose network", [CUSTOM, "model._target_=networks.Pose", "task=keypoints"], 20),
}  # fmt: skip
HOW = [
    "dataset=digit_scenes", "train=adamw", "train.lr=2e-3", "qat.lr=1e-3", "qat.optimizer=adamw",
    "reest.num_batches=30", "tracking.enabled=false", "export.min_agreement=0",
]  # fmt: skip
QAT_EPOCHS = 3
STAGES = {"ptq": "quantized", "recal_only": "recalibrated only", "qat": "QAT", "reest": "re-estimated"}
SURE = 2.0  # standard errors of the mean, beyond which a change of the images' scores counts
Row = dict[str, Any]


def jobs(names: list[str], bits: list[int]) -> Iterator[tuple[str, int, int]]:
    """Network, bits of its weights, epochs of QAT."""
    for name in names:
        for count in bits:
            for epochs in (0, QAT_EPOCHS):
                yield name, count, epochs


def measured(name: str, bits: int, qat: int, folder: Path, epochs: int | None) -> Row:
    """What one job measures."""
    heading, how, trained = NETWORKS[name]
    overrides = [
        *HOW, *how, f"train.epochs={epochs or trained}", f"quant=w{bits}a8", f"qat.epochs={qat}",
        f"runtime.output_dir={folder}",
    ]  # fmt: skip
    config = compose_config(overrides)
    results = run(config, run_dir=folder / "runs" / f"{name}-w{bits}-{qat}", overrides=overrides, console=quiet())
    evaluations = results.evaluations
    before = next(stage for stage in ("qat", "recal_only", "ptq") if stage in evaluations)
    headline = evaluations["fp32"].headline
    return {
        "network": heading, "metric": headline.label, "bits": bits, "qat": qat,
        "values": {stage: evaluation.value for stage, evaluation in evaluations.items()},
        "agreement": results.metrics[f"onnx/{headline.name}_agreement"],
        "before": before, **verdict(evaluations[before], evaluations["reest"]),
    }  # fmt: skip


def verdict(before: Evaluation, after: Evaluation) -> Mapping[str, Any]:
    """Whether re-estimation helps: the mean change of the images' scores, beside its standard error."""
    change = (after.scores - before.scores).double()
    mean, error = float(change.mean()), float(change.std()) / math.sqrt(len(change))
    word = "helps" if mean > SURE * error else "harms" if mean < -SURE * error else "no clear change"
    return {"verdict": word, "change": mean, "error": error}


def quiet() -> Console:
    """A console that shows nothing."""
    return Console(file=io.StringIO())


def picture(rows: list[Row], path: Path) -> None:
    """A panel a network: its metric by the bits of the weights, before and after re-estimation, also with QAT."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["network"] for row in rows))
    columns = (len(names) + 1) // 2
    figure, axes = pyplot.subplots(2, columns, figsize=(3.6 * columns, 6), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for name, axis in zip(names, axes.flat):
        own = [row for row in rows if row["network"] == name]
        axis.axhline(own[0]["values"]["fp32"], color="gray", linestyle=":", label="FP32")
        for is_qat, color in ((False, "tab:blue"), (True, "tab:orange")):
            some = sorted((row for row in own if bool(row["qat"]) == is_qat), key=lambda row: row["bits"])
            bits, label = [row["bits"] for row in some], "with QAT" if is_qat else "without QAT"
            before = [row["values"][row["before"]] for row in some]
            axis.plot(bits, before, "o--", color=color, alpha=0.6, label=f"{label}, before")
            axis.plot(bits, [row["values"]["reest"] for row in some], "o-", color=color, label=f"{label}, re-estimated")
        axis.set(title=name, xlabel="bits of weights", ylabel=own[0]["metric"], xticks=sorted({r["bits"] for r in own}))
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def page(rows: list[Row], command: str, image: str) -> str:
    """The table, as Markdown."""
    lines = [
        "# Trained networks of other tasks",
        "",
        f"![the metric of each network before and after re-estimation, by bits of its weights]({image})",
        "",
        f"Made by `{command}` (torch {torch.__version__}, {platform.machine()}, CPU). Every network is trained from "
        "scratch on `dataset=digit_scenes` (1200 scenes of 64×64 pixels, of which a tenth are for validation; 300 to "
        "test on), its weights are quantized per channel with MSE ranges, activations at 8 bits, and 30 batches "
        "re-estimate its BN statistics. FP32 training is short (5 to 20 epochs), so that QAT, 3 more epochs of AdamW, "
        "may end above it. *Before* is what re-estimation starts from: without "
        "QAT the quantized network, its activation ranges fitted anew; with QAT the trained one. *Folded* has its BNs "
        "in the weight scales and biases on the int32 grid; *ONNX Runtime* is the exported file, in another process. "
        "The verdict is of the scores of the 300 images (a detector's: average precision of the image at an overlap "
        "of 0.5; of a segmenter the part of the pixels that is right; the denoiser's PSNR [dB]; of keypoints the part "
        "that is right): the mean change by "
        f"re-estimation, and whether it is more than {SURE:.0f} standard errors (in brackets).",
        "",
        "| network, metric | weights | QAT | FP32 | quantized | before | re-estimated | folded | ONNX Runtime "
        "| agreement | re-estimation |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        values = row["values"]
        cells = [values["fp32"], values["ptq"], values[row["before"]], values["reest"], values["fold"], values["onnx"]]
        lines.append(
            f"| {row['network']}, {row['metric']} | {row['bits']} bits | {'yes' if row['qat'] else 'no'} | "
            + " | ".join(f"{value:.4f}" for value in cells)
            + f" | {row['agreement']:.4f} | {row['verdict']}: {row['change']:+.4f} ({row['error']:.4f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4, 8), default=[4, 3, 2])
    parser.add_argument("--epochs", type=int, help="FP32 epochs, in place of each network's own")
    parser.add_argument("--folder", type=Path, default=Path("outputs/trained"), help="runs and the stage store")
    parser.add_argument("--output", type=Path, default=Path("docs/trained"), help="without its ending")
    parser.add_argument("--render", action="store_true", help="only the page and the picture, from OUTPUT.json")
    given = parser.parse_args()
    rows, console = list[Row](), Console()
    if given.render:
        known = json.loads(given.output.with_suffix(".json").read_text())
        leave(known["rows"], known["command"], given.output)
        return
    for name, bits, qat in jobs(given.network, given.bits):
        with console.status(f"{NETWORKS[name][0]}, {bits} bits, {'QAT' if qat else 'no QAT'}"):
            row = measured(name, bits, qat, given.folder, given.epochs)
        rows.append(row)
        console.print(page([row], "", "").splitlines()[-1], highlight=False)
        command = shlex.join(["python", "scripts/bench/trained/trained.py", *sys.argv[1:]])
        given.output.with_suffix(".json").write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
        leave(rows, command, given.output)


def leave(rows: list[Row], command: str, output: Path) -> None:
    """Write the page and its picture."""
    image = output.parent / "images" / f"{output.name}.png"
    picture(rows, image)
    output.with_suffix(".md").write_text(page(rows, command, f"images/{image.name}"))


if __name__ == "__main__":
    main()
