"""Bring to MLflow what runs could not deliver while it was slow or out of reach: bnre-exp-sync [OUTPUT_DIR or RUN].
What is there already is not sent again. Credentials are taken from MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from bnre_exp.errors import UserError
from bnre_exp.jobs.folders import held_if_dead
from bnre_exp.tracking import sync, undelivered
from bnre_exp.tracking.journal import NAME, read_records


def waiting(output: Path) -> list[Path]:
    """Folders of runs that MLflow does not have whole, sweeps before their jobs."""
    return [folder for folder in sorted(path.parent for path in output.rglob(NAME)) if undelivered(folder)]


def _around(folders: Sequence[Path]) -> list[Path]:
    """The folders of the sweeps that runs are part of, without those that are among the runs."""
    parents = [folder / (read_records(folder)[0]["run"].get("parent") or ".") for folder in folders]
    known = {folder.resolve() for folder in folders}
    return [path for path in dict.fromkeys(path.resolve() for path in parents) if path not in known]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status. arguments: None means those of the process."""
    parser = argparse.ArgumentParser(prog="bnre-exp-sync", description=__doc__)
    default = Path(os.environ.get("BNRE_OUTPUT_DIR", "outputs"))
    parser.add_argument(
        "output", nargs="?", type=Path, default=default, help="of the runs; or one run; default: %(default)s"
    )
    parser.add_argument("--uri", help="where to, instead of the store that a run was begun with, which may be gone")
    given = parser.parse_args(arguments)
    if not given.output.is_dir():
        parser.error(f"there is no folder {given.output.absolute()}")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")  # a checkpoint may take its time
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False)
    if not any(given.output.rglob(NAME)):
        parser.error(f"there are no runs in {given.output.absolute()}")
    folders = waiting(given.output)
    if not folders:
        console.print(f"MLflow has everything of the runs in {given.output}.")
        return 0
    sent = failed = 0
    if given.uri:  # elsewhere, a job's sweep has to be there too, also one that was delivered whole
        folders += _around(folders)
    for folder in track(folders, "delivering", console=console, disable=not console.is_terminal):
        with held_if_dead(folder) as is_held:
            if not is_held:
                console.print(f"{folder}: still running, and delivers by itself", soft_wrap=True)
                continue
            try:
                records, left = sync(folder, given.uri)
            except UserError as error:
                console.print(f"{folder}: {undelivered(folder)} records are not delivered: {error}", soft_wrap=True)
                failed += 1
                continue
            sent += records
            console.print(f"{folder}: {records} records delivered" + (f", {left} left" if left else ""), soft_wrap=True)
    console.print(f"{sent} records of {len(folders)} runs delivered; {failed} runs could not be.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
