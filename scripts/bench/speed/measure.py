"""Timing in one process, contender by contender in turn, and peak memory, each contender in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from scripts.bench.speed.case import (
    CALIBRATE_8,
    EVALUATE,
    FOLD,
    INSERT,
    QAT,
    REESTIMATE,
    STEPS,
    Case,
    Step,
    now,
)

Make = Callable[[Case], dict[str, Step]]
Row = dict[str, Any]
BATCHES = (QAT, REESTIMATE, EVALUATE)
BY_MEMORY = (INSERT, EVALUATE, CALIBRATE_8, REESTIMATE, QAT, FOLD)


@dataclass(frozen=True)
class Rounds:
    """How often each step is measured: as often as ``seconds`` allow in rounds as long as the first, within bounds.

    least_calls: in place of ``least`` for whole calls, which take long and vary little.
    """

    seconds: float = 10.0
    least: int = 3
    least_calls: int = 2
    most: int = 11

    def count(self, step: str, took: float) -> int:
        least = self.least if step in BATCHES else self.least_calls
        return max(least, min(self.most, round(self.seconds / max(took, 1e-9))))


QUICK = Rounds(least=1, least_calls=1, most=1)


def timings(case: Case, makes: Mapping[str, Make], rounds: Rounds) -> Iterator[Row]:
    """A row for every step of every contender: its ``seconds``, one a round, or the ``error`` that it raised."""
    steps: dict[str, dict[str, Step]] = {}
    for name, make in makes.items():
        try:
            steps[name] = make(case)
        except Exception as error:  # a contender that fails leaves a cell empty, not the benchmark
            yield {"step": INSERT, "contender": name, "error": _words(error)}
    for step in STEPS:
        of_step = {name: its[step] for name, its in steps.items() if step in its}
        if of_step:
            yield from _interleaved(step, of_step, rounds, case.device)


def _interleaved(step: str, of_step: Mapping[str, Step], rounds: Rounds, device: str) -> Iterator[Row]:
    rows: dict[str, Row] = {name: {"step": step, "contender": name, "seconds": []} for name in of_step}
    order = list(of_step)

    def play() -> float:
        began = now(device)
        for name in [name for name in order if "seconds" in rows[name]]:
            try:
                rows[name]["seconds"].append(of_step[name]())
            except Exception as error:
                rows[name] = {"step": step, "contender": name, "error": _words(error)}
        order.append(order.pop(0))  # so that none always follows the same one
        return now(device) - began

    gc.collect()
    for _ in range(rounds.count(step, play()) - 1):
        play()
    yield from rows.values()


def _words(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def median(row: Mapping[str, Any]) -> float:
    return statistics.median(row["seconds"])


def peaks(case: Case, makes: Mapping[str, Make], jobs: int) -> Iterator[Row]:
    """Rows with the peak ``bytes`` of every step above the idle process; ``jobs`` contenders at a time.

    To be called before this process computes anything: a process that is forked later may hang.
    """
    method = "fork" if sys.platform == "linux" and case.device == "cpu" else "spawn"
    context, queue = multiprocessing.get_context(method), list(makes.items())
    running: dict[Connection, tuple[Any, str]] = {}
    while queue or running:
        while queue and len(running) < jobs:
            name, make = queue.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, name, make, replace(case, timed=1)), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (process, name)
        for connection in wait(list(running)):
            process, name = running.pop(connection)  # type: ignore[call-overload]
            try:
                rows = connection.recv()  # type: ignore[union-attr]
            except EOFError:
                rows = None
            process.join()
            died = {"step": INSERT, "contender": name, "error": f"its process ended with {process.exitcode}"}
            yield from [died] if rows is None else rows


def _child(connection: Connection, name: str, make: Make, case: Case) -> None:
    logging.disable(logging.WARNING)
    case.network_of(), case.batches()  # they stay; and the code that they need is read in, which is no step's memory
    idle, rows, is_built = _trim(case.device), [], False
    steps = make(case)
    for step in [step for step in BY_MEMORY if step in steps]:
        try:
            if step != INSERT and not is_built:  # the first one makes the simulation, which is another step's peak
                steps[step]()
                is_built = True
            _trim(case.device)
            steps[step]()
            rows.append({"step": step, "contender": name, "bytes": _peak(case.device) - idle})
        except Exception as error:
            rows.append({"step": step, "contender": name, "error": _words(error)})
    connection.send(rows)


def _trim(device: str) -> int:
    """Give back what is free, forget the peak of before, and return the bytes that are held."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.startswith("cuda") else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def can_measure_memory(device: str) -> bool:
    """Whether the peak since a moment is known: of a process Linux tells it, of a GPU torch does."""
    return device.startswith("cuda") or Path("/proc/self/clear_refs").exists()
