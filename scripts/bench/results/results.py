#!/usr/bin/env python
"""What re-estimation brings MobileNetV2 and ResNet18 on Fashion-MNIST, over three seeds, beside AIMET.

    python scripts/bench/results/results.py --processes 2           # all of it; some hours on two cores
    python scripts/bench/results/results.py --network resnet18 --seed 0 --scheme w3a8      # a part

Needs the extra bench, and Fashion-MNIST (Debian's package dataset-fashion-mnist, or a download). Every job goes through
the runner. What is measured is kept in FOLDER, so that an interrupted command goes on where it was. Writes OUTPUT.md,
OUTPUT.json and a picture in the folder images beside them; --render makes the page again from OUTPUT.json.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from bnre_exp.cli.compose import compose_config  # noqa: E402
from bnre_exp.data import DataSpec, Loaders, build_loaders, resolve_preprocessing  # noqa: E402
from bnre_exp.jobs.run import run  # noqa: E402
from bnre_exp.tasks import Evaluation  # noqa: E402
from bnre_exp.tracking.journal import read_records  # noqa: E402
from scripts.bench.results.cases import BATCH_SIZE, COMMON, LATER, NETWORKS, SCHEMES, jobs  # noqa: E402
from scripts.bench.results.page import markdown  # noqa: E402
from scripts.bench.results.pictures import draw  # noqa: E402
from scripts.bench.results.summary import summary  # noqa: E402

EPOCHS = 3
KEPT = ("reest/batches", "reest_only/batches", "qat/oscillating", "qat/frozen", "reest/self_consistency")
Measured = dict[str, Any]  # rows: {name: {value, right, seconds}}, metrics, curve


def measure(network: str, seed: int, schemes: list[str], folder: Path, epochs: int) -> str:
    """All that is not measured yet of one network and seed."""
    torch.set_num_threads(1)
    fp32 = _fp32(network, seed, folder, epochs)
    for scheme in schemes:
        for job, how in jobs(scheme).items():
            path = _path(folder, network, seed, scheme, job)
            if not path.exists():
                overrides = [*LATER, f"model.checkpoint={fp32}", *how]
                _keep(path, _run(network, seed, overrides, folder, f"{network}-{seed}-{scheme}-{job}"))
        if not _path(folder, network, seed, scheme, "aimet qat prepared").exists():
            _aimet(network, seed, scheme, fp32, folder)
    return f"{network}, seed {seed}"


def _fp32(network: str, seed: int, folder: Path, epochs: int) -> Path:
    """The trained network, of the whole training data."""
    run_dir = folder / "runs" / f"{network}-{seed}-fp32"
    weights = run_dir / "fp32.safetensors"
    if not weights.exists():
        how = [f"train.epochs={epochs}", "qat=off", "reest=off", "quant=w8a8"]
        _run(network, seed, how, folder, run_dir.name)
    return weights


def _run(network: str, seed: int, more: list[str], folder: Path, name: str) -> Measured:
    """One job of the runner, and what it measures."""
    overrides = [*COMMON, f"model={network}", f"seed={seed}", f"runtime.output_dir={folder}", *more]
    run_dir = folder / "runs" / name
    results = run(compose_config(overrides), run_dir=run_dir, overrides=overrides, console=Console(file=io.StringIO()))
    rows = {
        row: _row(evaluation, results.metrics.get(f"{row}/seconds", 0.0))
        for row, evaluation in results.evaluations.items()
    }
    values = [(record["step"], record["metrics"]) for record in read_records(run_dir) if "metrics" in record]
    curve = {step: found["reest/val_top1"] for step, found in values if step and "reest/val_top1" in found}
    for _, found in values:
        if curve and "qat/val_top1" in found:
            curve[0] = found["qat/val_top1"]  # without re-estimation
    metrics = {name: value for name, value in results.metrics.items() if name in KEPT}
    return {"rows": rows, "metrics": metrics, "curve": curve}


def _aimet(network: str, seed: int, scheme: str, fp32: Path, folder: Path) -> None:
    from scripts.bench.results.aimet import pipeline

    weight_bits, act_bits = map(int, scheme[1:].split("a"))
    measured: dict[str, Measured] = {}
    for job, row, evaluation, seconds in pipeline(network, fp32, _loaders(seed), weight_bits, act_bits):
        measured.setdefault(job, {"rows": {}, "metrics": {}, "curve": {}})["rows"][row] = _row(evaluation, seconds)
    for job, found in measured.items():
        _keep(_path(folder, network, seed, scheme, job), found)


def _loaders(seed: int) -> Loaders:
    """The batches that jobs have."""
    data = compose_config([*COMMON, *LATER[:2]]).dataset
    preprocessing = resolve_preprocessing(
        None, image_size=data.image_size, mean=None, std=None, default_image_size=data.default_image_size,
        default_mean=data.default_mean, default_std=data.default_std, channels=3,
    )  # fmt: skip
    spec = DataSpec(
        data._target_, seed=seed, batch_size=BATCH_SIZE, val_fraction=data.val_fraction, train_limit=data.train_limit
    )
    return build_loaders(spec, preprocessing=preprocessing)


def _row(evaluation: Evaluation, seconds: float) -> dict[str, Any]:
    """Top-1, and which test images are right, as bits."""
    right = base64.b64encode(np.packbits(evaluation.scores.numpy() > 0.5).tobytes()).decode()
    return {"value": evaluation.value, "right": right, "images": evaluation.count, "seconds": seconds}


def _path(folder: Path, network: str, seed: int, scheme: str, job: str) -> Path:
    return folder / "measured" / f"{network}-{seed}-{scheme}-{job.replace(' ', '_')}.json"


def _keep(path: Path, measured: Measured) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(measured))
    os.replace(partial, path)


def measured_so_far(folder: Path) -> dict[tuple[str, int, str, str], Measured]:
    """By network, seed, scheme and job."""
    found = {}
    for path in sorted((folder / "measured").glob("*.json")):
        network, seed, scheme, job = path.stem.split("-", 3)
        found[network, int(seed), scheme, job.replace("_", " ")] = json.loads(path.read_text())
    return found


def leave(known: Mapping[str, Any], output: Path) -> None:
    """Write the page and its pictures."""
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw(known, output.parent / "images", output.name)
    output.with_suffix(".md").write_text(markdown(known, [f"images/{path.name}" for path in pictures]))


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of FP32 training (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="of one thread each, at a time (default %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("outputs/results"), help="what was measured, and the store")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="without its ending")
    parser.add_argument("--render", action="store_true", help="measure nothing: the page from OUTPUT.json")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    given = parsed(arguments)
    table = given.output.with_suffix(".json")
    if given.render:
        leave(json.loads(table.read_text()), given.output)
        return
    from scripts.bench.results.aimet import fold_result

    folder, started = given.folder.resolve(), time.perf_counter()
    tasks = [(network, seed) for seed in given.seed for network in given.network]
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(measure, *task, given.scheme, folder, given.epochs) for task in tasks]
        for future in as_completed(futures):
            print(f"{future.result()}: {(time.perf_counter() - started) / 60:.0f} min", flush=True)
    known = {
        "aimet": version("aimet-torch"), "aimet_fold": {n: fold_result(n, _loaders(0)) for n in given.network},
        "command": shlex.join(["python", "scripts/bench/results/results.py", *arguments]), "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "epochs": given.epochs,
        **summary(measured_so_far(folder)),
    }  # fmt: skip
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps(known, indent=1) + "\n")
    leave(known, given.output)


if __name__ == "__main__":
    main(sys.argv[1:])
