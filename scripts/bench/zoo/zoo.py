#!/usr/bin/env python
"""Quantize, re-estimate, fold and save every network of a zoo, each in a process of its own, and write a table.

    python scripts/bench/zoo/zoo.py          # torchvision, and one network of every family of timm
    python scripts/bench/zoo/zoo.py --source timm --filter 'mobilenet*'      # any others

What is checked of a network is in zoo_network.py and zoo_checks.py. Weights are random. The rows are kept in
OUTPUT.csv: an interrupted run goes on where it was, and networks that are there already are not done again unless
--again is given.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import logging
import multiprocessing
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SCRIPTS = Path(__file__).parent
sys.path.insert(0, str(SCRIPTS))
import packages  # noqa: E402
import zoo_network  # noqa: E402

BACKBONES = (
    "fasterrcnn_resnet50_fpn_backbone",
    "fasterrcnn_mobilenet_v3_large_fpn_backbone",
    "ssdlite320_mobilenet_v3_large_backbone",
)
NOT_WHOLE = ("torchvision.models.detection", "torchvision.models.quantization", "torchvision.models.optical_flow")
COLUMNS = (
    "source", "name", "status", "parameters", "input", "gammas", "weights", "weights_named", "activations", "bns",
    "folded", "kept", "modes", "logits_float32", "rounding", "logits_float64", "layers_float32", "layers_float64",
    "seconds", "reasons", "error",
)  # fmt: skip
COUNTS = ("activations", "bns", "folded", "kept")
DIFFERENCES = ("logits_float32", "rounding", "logits_float64", "layers_float32", "layers_float64")
Row = dict[str, Any]
Check = Callable[[str, str], Row]


def names_of(source: str) -> list[str]:
    """All networks of a source that the pipeline applies to: of torchvision's detectors the backbones; as wholes they
    are a source of their own."""
    if source in packages.SOURCES:
        return list(packages.SOURCES[source][0]())
    if source == "timm":
        import timm

        return list(timm.list_models())
    builders = {name: torchvision.models.get_model_builder(name) for name in torchvision.models.list_models()}
    return [name for name, builder in builders.items() if not builder.__module__.startswith(NOT_WHOLE)] + [*BACKBONES]


def chosen(sources: Sequence[str], patterns: Sequence[str]) -> list[tuple[str, str]]:
    """The networks asked for, as (source, name); of timm without a pattern, those in zoo_timm.txt."""
    found = []
    for source in sources:
        names = names_of(source)
        if patterns:
            names = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        elif source == "timm":
            lines = (SCRIPTS / "zoo_timm.txt").read_text().splitlines()
            names = [line for line in lines if line and not line.startswith("#")]
        found += [(source, name) for name in names]
    return found


def _child(connection: Connection, check: Check, source: str, name: str, gibibytes: float) -> None:
    limit = int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # that a checkpoint needs the network's code
    connection.send(check(source, name))


def results(
    networks: Sequence[tuple[str, str]], jobs: int, timeout: float, gibibytes: float, check: Check = zoo_network.run
) -> Iterator[Row]:
    """A row for every network as it is finished, ``jobs`` at a time; one that takes too long or dies is named so."""
    context, queue = multiprocessing.get_context("fork"), list(networks)  # forked: torch is imported once
    running: dict[Connection, tuple[Any, str, str, float]] = {}
    try:
        while queue or running:
            while queue and len(running) < jobs:
                source, name = queue.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(theirs, check, source, name, gibibytes), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (process, source, name, time.monotonic())
            ready = wait(list(running), timeout=1)
            for connection, (process, source, name, started) in list(running.items()):
                row: Row = {"source": source, "name": name, "seconds": round(time.monotonic() - started, 1)}
                if connection in ready:
                    try:
                        row = connection.recv()  # type: ignore[attr-defined]
                    except EOFError:
                        process.join()
                        row |= {"status": "failed", "error": f"its process died with exit code {process.exitcode}"}
                elif time.monotonic() - started > timeout:
                    process.kill()
                    row |= {"status": "failed", "error": f"it took more than {timeout:.0f} s"}
                else:
                    continue
                del running[connection]
                process.join()
                yield row
    finally:
        for process, *_ in running.values():
            process.kill()


def read_rows(path: Path) -> dict[tuple[str, str], Row]:
    """Rows of an earlier run by (source, name)."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
    return {(row["source"], row["name"]): {**row, "reasons": json.loads(row.get("reasons", "{}"))} for row in rows}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """All rows as CSV, whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "reasons": json.dumps(row.get("reasons", {}))} for row in rows)
    part.replace(path)


def markdown(rows: Sequence[Row], command: str) -> str:
    """The table, what was not passed, and every reason for a BN that is kept."""
    with_bn = [row for row in rows if row["status"] != "no BN"]
    passed = [row for row in with_bn if row["status"] == "passed"]
    lines = [
        "# Real networks: what is quantized and folded",
        "",
        f"Made by `{command}` (torch {torch.__version__.partition('+')[0]}, torchvision "
        f"{torchvision.__version__.partition('+')[0]}{_timm_version(rows)}, {platform.machine()}, CPU, one thread a "
        "network). " + HOW,
        "",
    ]
    for source in dict.fromkeys(row["source"] for row in with_bn):
        of_source = [row for row in with_bn if row["source"] == source]
        good = sum(row["status"] == "passed" for row in of_source)
        lines.append(f"- {source}: {good} of {len(of_source)} networks with BN pass")
    found, folded, kept = (sum(int(row[key]) for row in passed) for key in ("bns", "folded", "kept"))
    lines += [f"- {found} BNs: {folded} folded, {kept} kept with a reason", ""]
    failed = [row for row in with_bn if row["status"] != "passed"]
    if failed:
        lines += ["## Not passed", "", "| network | outcome | error |", "|---|---|---|"]
        lines += [f"| {row['name']} | {row['status']} | {_cell(row['error'])} |" for row in failed] + [""]
    lines += [
        "## Passed",
        "",
        "| network | parameters | input | weights at 4 bits (float, named) | activation quantizers | BN | folded "
        "| kept | logits, float32 | own rounding | logits, float64 | layers, float32 | layers, float64 | s |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [_line(row) for row in passed]
    lines += ["", "## Why BNs are kept", "", "| reason | BNs | networks |", "|---|--:|---|"]
    counts: dict[str, dict[str, int]] = {}
    for row in passed:
        for reason, count in row["reasons"].items():
            of_kind = counts.setdefault(re.sub(r"\b\w+(\.\w+)+", "LAYER", reason), {})
            of_kind[row["name"]] = of_kind.get(row["name"], 0) + count
    for reason, by_network in sorted(counts.items()):
        lines.append(f"| {_cell(reason)} | {sum(by_network.values())} | {', '.join(by_network)} |")
    without = [row["name"] for row in rows if row["status"] == "no BN"]
    lines += ["", f"Without BN, so not in the table: {', '.join(without)}."] if without else []
    return "\n".join(lines) + "\n"


HOW = """Weights, BN parameters and statistics are random, weights quantized at 4 bits per channel, activations at 8.
Every network goes through quantize, calibrate, a backward pass in training mode (which has to reach the scale of every
weight that it reaches in the float network), scales that are moved at random as QAT would move them, re-estimate (only
BN statistics change, undone bit for bit, done again), fold, save and load (same outputs bit for bit). Differences are
those of folding, the largest over the outputs divided by the largest output, with activations unquantized: of the
logits; and of every folded layer, given the same input as its original. *Own rounding* is how far the folded network in
float32 is from itself in float64 on that input: deep networks with random weights multiply every rounding error, folded
or not. (Where the places of maxima guide an unpooling, rounding moves values, and the float64 figures decide.) Of a
network that is quantized in parts (`submodules=`: detectors), every part gets the same inputs before and after folding,
its outputs are the logits here, and the row is that of all parts together. The number of folded BNs equals a count by
autograd's record of the original network (foldable.py). ⁺: no gamma is negative or zero, because with such ones the
network overflows or rounding errors outgrow its signals."""


def _timm_version(rows: Sequence[Row]) -> str:
    if not any(row["source"] == "timm" for row in rows):
        return ""
    import timm

    return f", timm {timm.__version__}"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _line(row: Row) -> str:
    figures = [f"{float(row[key]):.0e}" for key in DIFFERENCES]
    star = "" if row["gammas"] != "positive" else " ⁺"
    cells = [f"{row['name']}{star}", f"{int(row['parameters']) / 1e6:.1f} M", row["input"]]
    cells += [f"{row['weights']} ({row['weights_named']})", *(str(row[key]) for key in COUNTS), *figures]
    return f"| {' | '.join([*cells, str(round(float(row['seconds'])))])} |"


def _command(rows: Sequence[Row], output: Path) -> str:
    """What makes the whole page, in however many starts it was made."""
    root = SCRIPTS.parents[2]
    output = output.resolve().relative_to(root) if output.resolve().is_relative_to(root) else Path(output.name)
    sources = dict.fromkeys(str(row["source"]) for row in rows)
    return f"python scripts/bench/zoo/zoo.py --source {' '.join(sources)} --output {output}"


def main(arguments: Sequence[str]) -> int:
    """Returns 1 if a network did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = ["torchvision", "timm", *packages.SOURCES]
    parser.add_argument("--source", nargs="+", choices=sources, help="default: torchvision timm")
    parser.add_argument("--filter", nargs="*", default=[], metavar="PATTERN", help="names, with * and ?")
    parser.add_argument("--jobs", type=int, default=2, help="networks at a time (default 2)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one network (default 900)")
    parser.add_argument("--memory", type=float, default=20, help="GiB for one network (default 20)")
    parser.add_argument("--output", type=Path, default=Path("outputs/zoo"), help="writes OUTPUT.csv and OUTPUT.md")
    parser.add_argument("--again", action="store_true", help="also networks that are in OUTPUT.csv")
    options = parser.parse_args(arguments)
    networks = chosen(options.source or ["torchvision", "timm"], options.filter)
    if not networks:
        parser.error(f"no network matches {' '.join(options.filter)}")
    table = options.output.with_suffix(".csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(table)
    todo = [network for network in networks if options.again or network not in rows]
    console = Console()
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("networks", total=len(todo))
        for row in results(todo, options.jobs, options.timeout, options.memory):
            rows[row["source"], row["name"]] = row
            write_rows(table, [rows[key] for key in sorted(rows)])
            outcome = row.get("error") or f"{row.get('folded', 0)} of {row.get('bns', 0)} BNs folded"
            progress.console.print(f"{row['status']:8} {row['name']}: {outcome}", highlight=False, markup=False)
            progress.advance(task)
    ordered = [rows[key] for key in sorted(rows)]
    options.output.with_suffix(".md").write_text(markdown(ordered, _command(ordered, options.output)))
    bad = [row for row in ordered if row["status"] not in ("passed", "no BN")]
    console.print(f"{len(ordered) - len(bad)} of {len(ordered)} in {table} and {options.output.with_suffix('.md')}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
