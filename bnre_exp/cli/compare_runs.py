"""Compare runs: what differs between them, their accuracy stage by stage, and plots. With neither --sweep nor --filter,
the newest sweep is compared, or all runs if there is none. Table and plots also go to files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from bnre_exp.cli.launch import stops_end
from bnre_exp.errors import UserError

if TYPE_CHECKING:  # neither --help nor a mistyped option needs to wait for torch
    from bnre_exp.report.comparison import RunRow


def as_rows(runs: Sequence[Mapping[str, Any]]) -> list[RunRow]:
    """Runs of MLflow as rows; those of sweeps themselves, which have no params, are left out."""
    from bnre_exp.jobs.reporting import headline_of
    from bnre_exp.report.comparison import RunRow

    return [
        RunRow(
            run["name"], run["status"], run["params"], run["metrics"], headline_of(run["tags"]),
            run["tags"].get("error"), run["tags"].get("overrides", ""), run["tags"].get("run_dir", ""),
            run["tags"].get("verdict.reest", ""),
        )
        for run in runs
        if run["params"]
    ]  # fmt: skip


def choose(sweep: str | None, filter_string: str | None, uri: str, experiment: str) -> tuple[str, list[RunRow]]:
    """A title and the rows that the arguments name. Raises ``UserError`` if there are none."""
    from bnre_exp.jobs.sweep import job_rows
    from bnre_exp.tracking import read_runs

    if sweep and Path(sweep).is_dir():
        title, rows = Path(sweep).name, job_rows(Path(sweep))
    else:
        runs = read_runs(uri, experiment, filter_string or "")
        parents = [run["id"] for run in runs if any(child["parent"] == run["id"] for child in runs)]
        if sweep or (filter_string is None and parents):
            parent = sweep or parents[-1]
            title = next((run["name"] for run in runs if run["id"] == parent), parent)
            rows = as_rows([run for run in runs if run["parent"] == parent])
        else:
            title, rows = filter_string or experiment, as_rows(runs)
    if not rows:
        asked = f"--sweep {sweep}" if sweep else f"--filter {filter_string!r}" if filter_string else experiment
        raise UserError(f"{asked}: no runs. --sweep takes the id of a sweep's run in MLflow, or a sweep's folder.")
    return title, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status. arguments: None means those of the process."""
    output = Path(os.environ.get("BNRE_OUTPUT_DIR", "outputs"))
    parser = argparse.ArgumentParser(prog="bnre-exp-compare", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sweep", metavar="ID", help="id of a sweep's run in MLflow, or the folder of a sweep")
    which.add_argument(
        "--filter", help="in MLflow's language: params.model.name = 'resnet18' and metrics.`fp32/loss` < 0.5"
    )
    parser.add_argument("--experiment", default="bnre_exp", help="of MLflow; default: %(default)s")
    parser.add_argument("--uri", default=f"sqlite:///{output / 'mlflow.db'}", help="of MLflow; default: %(default)s")
    parser.add_argument(
        "--to", type=Path, default=output / "comparison", help="folder of the files; default: %(default)s"
    )
    given = parser.parse_args(arguments)
    database = Path(given.uri.removeprefix("sqlite:///"))
    by_folder = given.sweep and Path(given.sweep).is_dir()
    if given.uri.startswith("sqlite:///") and not database.exists() and not by_folder:
        sys.stderr.write(f"Error: there is no {database.absolute()}. Run this where the runs were, or name --uri.\n")
        return 2
    with stops_end():  # all of torch
        from bnre_exp.jobs.stages.table import HEADINGS
        from bnre_exp.jobs.sweep import leave_comparison
        from bnre_exp.report.comparison import comparison_table
        from bnre_exp.report.seeds import over_seeds

    try:
        title, rows = choose(given.sweep, given.filter, given.uri, given.experiment)
    except UserError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(comparison_table(title, over_seeds(rows), HEADINGS, console.width))
    try:
        paths = leave_comparison(title, rows, given.to)
    except OSError as error:
        sys.stderr.write(f"Error: cannot write to {given.to}: {error.strerror}. Name another folder with --to.\n")
        return 2
    for path in paths:
        console.print(Text(str(path), style="cyan"), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
