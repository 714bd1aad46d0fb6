"""What the stage store holds, and room in it: bnre-exp-store [list|prune] [--help]."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bnre_exp.jobs.store import Entry, Store
from bnre_exp.tracking.typed_text import typed

IDENTIFYING = ("model.name", "model._target_", "dataset._target_")


def differences(entries: Sequence[Entry]) -> dict[str, str]:
    """By folder name: network and data, and the settings in which an entry differs from others of its stage."""
    by_stage: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_stage[entry.stage].append(entry)
    texts = {}
    for members in by_stage.values():
        names = list(dict.fromkeys(name for entry in members for name in entry.config))
        differing = [name for name in names if len({typed(entry.config.get(name)) for entry in members}) > 1]
        for entry in members:
            shown = [_identity(entry.config)]
            own = [name for name in differing if name in entry.config and name not in IDENTIFYING]
            shown += [f"{name}={typed(entry.config[name])}" for name in own]
            texts[entry.folder.name] = " ".join(shown)
    return texts


def _identity(config: Any) -> str:
    model = config.get("model.name") or str(config.get("model._target_")).rpartition(".")[2]
    return f"{model} on {str(config.get('dataset._target_')).rpartition('.')[2]}"


def age(seconds: float) -> str:
    """5 s, 12 min, 3 h, 4 days."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def table(entries: Sequence[Entry], now: float) -> Table:
    """One row an entry: stage, what it is of, size, age, when it was last used, and its folder."""
    from bnre_exp.jobs.stages.table import STAGES  # late: it imports torch

    order = [stage.name for stage in STAGES]
    found, texts = Table(), differences(entries)
    for heading in ("stage", "of", "MB", "made", "used", "entry"):
        found.add_column(heading, justify="right" if heading in ("MB", "made", "used") else "left", overflow="fold")
    for entry in sorted(entries, key=lambda entry: (order.index(entry.stage), texts[entry.folder.name])):
        row = (f"{entry.size / 1e6:.1f}", age(now - entry.created), age(now - entry.used))
        found.add_row(entry.stage, texts[entry.folder.name], *row, entry.folder.name[:16])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status. arguments: None means those of the process."""
    output = Path(os.environ.get("BNRE_OUTPUT_DIR", "outputs"))
    parser = argparse.ArgumentParser(prog="bnre-exp-store", description="List or prune the stage store.")
    parser.add_argument("action", nargs="?", choices=("list", "prune"), default="list")
    parser.add_argument(
        "--dir", type=Path, default=output / "store", help="the store (store.dir); default: %(default)s"
    )
    parser.add_argument("--max-gb", type=float, help="prune: the least recently used go until this many GB are left")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="prune: what was not used that long goes")
    parser.add_argument("--all", action="store_true", help="prune: everything that no running job uses")
    given = parser.parse_args(arguments)
    if not given.dir.is_dir():
        parser.error(f"there is no store in {given.dir.absolute()}; name its folder with --dir")
    console, store, now = Console(width=None if sys.stdout.isatty() else 140), Store(given.dir), time.time()
    if given.action == "list":
        entries = store.entries()
        console.print(table(entries, now))
        damaged = len(list((given.dir / "damaged").glob("*")))
        aside = f"; {damaged} damaged ones set aside (prune removes them)" if damaged else ""
        console.print(f"{len(entries)} results, {sum(e.size for e in entries) / 1e9:.2f} GB in {given.dir}{aside}")
        return 0
    if given.max_gb is None and given.older_than is None and not given.all:
        parser.error("prune: say what goes: --max-gb GB, --older-than DAYS or --all")
    locked = [path for path in given.dir.glob("[elp]*/") if not os.access(path, os.W_OK)]  # entries, locks, partial
    if locked:
        parser.error(f"prune: {locked[0].absolute()} cannot be written by you; its owner can prune, or share it")
    limit = 0.0 if given.all else float("inf") if given.max_gb is None else given.max_gb * 1e9
    removed = store.evict(limit, now - given.older_than * 86400 if given.older_than is not None else 0.0)
    damaged = store.remove_damaged()
    left = store.entries()
    console.print(
        f"{len(removed)} results removed ({sum(e.size for e in removed) / 1e9:.2f} GB), {damaged} damaged ones; "
        f"{len(left)} left ({sum(e.size for e in left) / 1e9:.2f} GB)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
