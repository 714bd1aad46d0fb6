#!/usr/bin/env python3
"""What a sweep over re-estimation batches costs, with the stage store and without: scripts/bench/bench_sweep.py FOLDER.

MobileNetV2 on Fashion-MNIST, 4 FP32 epochs and 1 QAT epoch, ten values of reest.num_batches. The time with the store is
compared with that of its own first job plus the stages downstream of QAT of the other nine, as those runs timed them,
and with the same sweep without a store, which takes an hour or more: --train-limit makes both smaller, --only runs one
of them, --values takes other numbers of batches.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bnre_exp.tracking.journal import last_metrics, read_records

BATCHES = "1,2,5,10,20,50,80,100,150,200"
DOWNSTREAM = ("reest", "fold", "export")


def sweep(output: Path, mode: str, values: str, overrides: Sequence[str]) -> float:
    """Run the sweep in a process of its own; returns its seconds."""
    command = [
        sys.executable, "-m", "bnre_exp", "-m", "model=mobilenet_v2", "dataset=fashion_mnist", "train.epochs=4",
        "qat.epochs=1", f"reest.num_batches={values}", f"store.mode={mode}", *overrides,
    ]  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open(output / "log.txt", "ab") as log:
        environment = {**os.environ, "BNRE_OUTPUT_DIR": str(output)}
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    return time.monotonic() - began


def jobs(output: Path) -> list[tuple[float, dict[str, float]]]:
    """Of each job, in order: seconds between its first record and its last, and its metrics."""
    (folder,) = (output / "multirun").iterdir()
    found = []
    for job in sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)):
        records = read_records(job)
        found.append((records[-1]["time"] - records[0]["time"], last_metrics(records)))
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where both sweeps go; must be new")
    parser.add_argument("--train-limit", type=int, help="training images; default: all 60 000")
    parser.add_argument("--only", choices=("reuse", "off"), help="run one of the two")
    parser.add_argument("--values", default=BATCHES, help="of reest.num_batches; default: %(default)s")
    given = parser.parse_args(arguments)
    overrides = [f"dataset.train_limit={given.train_limit}"] if given.train_limit else []
    seconds = {}
    for mode in [given.only] if given.only else ["reuse", "off"]:
        seconds[mode] = sweep(given.folder.absolute() / mode, mode, given.values, overrides)
        print(f"store.mode={mode}: {seconds[mode]:.0f} s", flush=True)
    if "reuse" in seconds:
        rows = jobs(given.folder / "reuse")
        first = rows[0][0]
        downstream = sum(metrics[f"{stage}/total_seconds"] for _, metrics in rows[1:] for stage in DOWNSTREAM)
        ratio = seconds["reuse"] / (first + downstream)
        print(
            f"one job {first:.0f} s, stages downstream of QAT of the other nine {downstream:.0f} s: ratio {ratio:.3f}"
        )
    if len(seconds) == 2:
        print(f"with the store against without: {seconds['reuse'] / seconds['off']:.3f}")
        same = [
            {name: value for name, value in one.items() if "seconds" not in name}
            == {name: value for name, value in other.items() if "seconds" not in name}
            for (_, one), (_, other) in zip(jobs(given.folder / "reuse"), jobs(given.folder / "off"))
        ]
        print(f"runs with the same metrics in both: {sum(same)} of {len(same)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
