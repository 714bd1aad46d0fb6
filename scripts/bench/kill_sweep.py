#!/usr/bin/env python3
"""Kill a sweep at random moments, repeat the command each time, and compare the end with an undisturbed sweep.

scripts/bench/kill_sweep.py FOLDER [--kills 20] [--seed 0] [-- OVERRIDES]. Exit status 1, with the differences, if
any run is missing, doubled, not FINISHED, or has other metrics (times aside).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnre_exp.tracking import read_runs

SWEEP = [
    "-m", "dataset.train_limit=256", "dataset.test_limit=64", "dataset.batch_size=32", "train.epochs=3", "qat.epochs=2",
    "quant.calib_batches=2", "quant.weight_bits=3,4", "reest.num_batches=0,2,4", "export=checkpoint",
]  # fmt: skip
TIMES = ("seconds",)


def start(output: Path, overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    """The sweep as a process group of its own; what it prints is added to output/log.txt."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "bnre_exp", *overrides],
            env={**os.environ, "BNRE_OUTPUT_DIR": str(output)}, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def kill_at_random(output: Path, overrides: Sequence[str], kills: int, longest: float, draw: random.Random) -> int:
    """Run to the end, killed up to ``kills`` times after 1 to ``longest`` seconds each; returns how often it was."""
    for done in range(kills):
        process = start(output, overrides)
        try:
            process.wait(timeout=draw.uniform(1, longest))
            return done
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"killed {done + 1} times", flush=True)
    status = start(output, overrides).wait()
    if status:
        raise SystemExit(f"the sweep ended with status {status}; see {output / 'log.txt'}")
    return kills


def measured(output: Path) -> dict[str, Mapping[str, Any]]:
    """Runs by name, with status and the metrics that are no times."""
    runs = read_runs(f"sqlite:///{output / 'mlflow.db'}", "bnre_exp")
    kept = {}
    for run in runs:
        metrics = {name: value for name, value in run["metrics"].items() if not name.endswith(TIMES)}
        if run["name"] in kept:
            raise SystemExit(f"there are two runs {run['name']}")
        kept[run["name"]] = {"status": run["status"], "metrics": metrics, "nested": run["parent"] is not None}
    return kept


def differences(disturbed: Mapping[str, Any], undisturbed: Mapping[str, Any]) -> list[str]:
    """What is not the same, a line each."""
    found = [f"run {name} is in one sweep only" for name in disturbed.keys() ^ undisturbed.keys()]
    for name in disturbed.keys() & undisturbed.keys():
        one, other = disturbed[name], undisturbed[name]
        for key in ("status", "nested"):
            if one[key] != other[key]:
                found.append(f"{name}: {key} {one[key]} instead of {other[key]}")
        for metric in sorted(one["metrics"].keys() | other["metrics"].keys()):
            if one["metrics"].get(metric) != other["metrics"].get(metric):
                values = one["metrics"].get(metric), other["metrics"].get(metric)
                found.append(f"{name}: {metric} is {values[0]} instead of {values[1]}")
    found += [f"{name} is {run['status']}" for name, run in disturbed.items() if run["status"] != "FINISHED"]
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where both sweeps go")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=15.0, help="seconds after which it is killed at the latest")
    parser.add_argument("overrides", nargs="*", help=f"the sweep; default: {' '.join(SWEEP)}")
    given = parser.parse_args(arguments)
    overrides, folder = given.overrides or SWEEP, given.folder.absolute()
    began = time.monotonic()
    if start(folder / "undisturbed", overrides).wait():
        raise SystemExit(f"the undisturbed sweep failed; see {folder / 'undisturbed' / 'log.txt'}")
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    kills = kill_at_random(folder / "killed", overrides, given.kills, given.longest, random.Random(given.seed))
    found = differences(measured(folder / "killed"), measured(folder / "undisturbed"))
    print("\n".join(found) or f"killed {kills} times: the same runs, all FINISHED, with the same metrics")
    return 1 if found or not kills else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
