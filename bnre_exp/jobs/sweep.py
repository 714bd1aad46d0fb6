"""A sweep: the run that its jobs are nested in, what became of them, and their comparison."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.text import Text

from bnre_exp.config import RuntimeConfig, TrackingConfig
from bnre_exp.errors import SweepFailed, UserError
from bnre_exp.jobs.folders import (
    FAILED,
    FINISHED,
    KILLED,
    RUNNING,
    RunRecord,
    held_if_dead,
    is_alive,
    read_record,
    set_aside,
    write_record,
)
from bnre_exp.jobs.provenance import git_tags
from bnre_exp.jobs.reporting import headline_of
from bnre_exp.jobs.stages.table import HEADINGS
from bnre_exp.report.comparison import (
    RunRow,
    comparison_csv,
    comparison_markdown,
    comparison_table,
    differing_params,
    result_columns,
)
from bnre_exp.report.comparison_html import comparison_page
from bnre_exp.report.page import REPORT, write_page
from bnre_exp.report.plots import save_plots
from bnre_exp.report.seeds import over_seeds
from bnre_exp.tracking import RunLog, end_run, open_run, sync
from bnre_exp.tracking.journal import all_tags, last_metrics, read_records
from bnre_exp.tracking.links import compare_link, ui_address, ui_command

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepPlan:
    """folder: of the sweep, its jobs below; overrides: as typed; label: what its run is called."""

    folder: Path
    identity: str
    label: str
    overrides: Sequence[str]
    tracking: TrackingConfig
    runtime: RuntimeConfig


def run_sweep(plan: SweepPlan, launch: Callable[[], None], console: Console) -> str | None:
    """Call ``launch``, which runs all jobs, inside the sweep's own run; compare them, however it ends. Returns what a
    search found best.

    Raises what ``launch`` raises if it was interrupted, :class:`SweepFailed` if jobs failed.
    """
    tags = {**git_tags(Path.cwd()), "overrides": " ".join(plan.overrides), "bnre.kind": "sweep"}
    tracking, output = plan.tracking, Path(plan.runtime.output_dir)
    with open_run(
        plan.folder, params={}, tags=tags, output_dir=output, experiment=tracking.experiment, run_name=plan.label,
        uri=tracking.uri, enabled=tracking.enabled, connect=False,
    ) as log:  # fmt: skip
        error: BaseException | None = None
        try:
            launch()
        except BaseException as caught:
            error = caught
        with suppress(UserError):  # the jobs have said so
            log.connect()
        close_dead_jobs(plan.folder)
        _leave_comparison(plan, log, console)
        best = best_trial(plan.folder)
        if best is not None:
            log.tags({"best": best})
            console.print(Text(f"best trial: {best}"), soft_wrap=True)
        failed = failed_jobs(plan.folder)
        if error is not None and (not failed or not isinstance(error, Exception)):
            raise error
        if failed:
            raise SweepFailed(f"{len(failed)} of {len(job_folders(plan.folder))} jobs failed", plan.folder) from error
    return best


def best_trial(folder: Path) -> str | None:
    """The best of a search, as overrides and value, from the file that Optuna's sweeper leaves; None without one."""
    file, sweep = folder / "optimization_results.yaml", read_record(folder)
    try:
        is_old = sweep is not None and file.stat().st_mtime < sweep.started
        found = yaml.safe_load(file.read_text())
        overrides, value = [f"{name}={value}" for name, value in found["best_params"].items()], found["best_value"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):  # none, or one of several objectives
        return None
    rows = job_rows(folder)
    if is_old or not rows:  # old: of another search in a folder that the user chose
        return None
    labels = {path: f"{record.label} " for path in job_folders(folder) if (record := read_record(path)) is not None}
    of_it = [path for path, label in labels.items() if all(f" {override} " in label for override in overrides)]
    objective = rows[0].params.get("objective", "null")
    objective = f"fold/val_{rows[0].headline.name}" if objective == "null" else objective
    return f"{' '.join(overrides)}: {objective} {value:.6g}" + (f" ({of_it[0]})" if of_it else "")


def job_folders(folder: Path) -> list[Path]:
    """The folders of a sweep's jobs that have started, by number; not those that an earlier sweep left there."""
    sweep = read_record(folder)
    since = sweep.started if sweep is not None else 0.0
    records = {path: read_record(path) for path in folder.iterdir()}
    found = [path for path, record in records.items() if record is not None and record.started >= since]
    return sorted(found, key=lambda path: (not path.name.isdigit(), int(path.name) if path.name.isdigit() else 0))


def failed_jobs(folder: Path) -> list[tuple[Path, RunRecord]]:
    """Jobs of a sweep that ended with an error."""
    records = [(path, read_record(path)) for path in job_folders(folder)]
    return [(path, record) for path, record in records if record is not None and record.status == FAILED]


def close_dead_jobs(folder: Path) -> None:
    """Runs whose process died without a word are KILLED, not RUNNING, in their record and in MLflow."""
    for _ in range(20):  # processes that are being killed take a moment
        if not any(is_alive(path) for path in job_folders(folder)):
            break
        time.sleep(0.1)
    for path in job_folders(folder):
        close_if_dead(path)


def close_if_dead(folder: Path) -> None:
    """Close one run, if it is RUNNING by its record and its process is dead."""
    with held_if_dead(folder) as is_held:
        record = read_record(folder)
        if is_held and record is not None and record.status == RUNNING:
            record.status = KILLED
            write_record(folder, record)
            end_run(folder, KILLED)


def make_room(folder: Path) -> None:
    """Set aside what another run left in a folder; what MLflow lacks of it is delivered first, or by bnre-exp-sync."""
    with suppress(UserError):
        sync(folder, is_bounded=True)
    set_aside(folder)


def job_rows(folder: Path) -> list[RunRow]:
    """The jobs of a sweep, from their own journals."""
    rows = []
    for path in job_folders(folder):
        records, record = read_records(path), read_record(path)
        if not records or record is None:
            continue
        params: dict[str, str] = next((r["params"] for r in records if "params" in r), {})
        name = str(records[0].get("run", {}).get("name", path.name))
        tags, overrides = all_tags(records), record.label.partition(": ")[2]
        rows.append(
            RunRow(
                name, record.status, params, last_metrics(records), headline_of(tags), record.error, overrides,
                str(path), tags.get("verdict.reest", ""),
            )
        )  # fmt: skip
    return rows


def leave_comparison(title: str, rows: Sequence[RunRow], folder: Path) -> list[Path]:
    """Write table (Markdown, CSV), plots (SVG, PNG) and a page with both into a folder; returns the files. In all but
    the CSV, runs that differ in the seed alone are one row; the page has them run by run as well."""
    folder.mkdir(parents=True, exist_ok=True)
    table, values, page = folder / "comparison.md", folder / "comparison.csv", folder / REPORT
    values.write_text(comparison_csv(rows))
    joined = over_seeds(rows)
    table.write_text(comparison_markdown(title, joined, HEADINGS))
    plots = save_plots(joined, folder, HEADINGS)
    pictures = [path for path in plots if path.suffix == ".svg"]
    write_page(page, comparison_page(title, rows, HEADINGS, folder, pictures))
    return [table, values, page, *plots]


def _shared(rows: Sequence[RunRow], params: Sequence[str], metrics: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of params and metrics, those that all finished runs have: parallel coordinates leave out a run that lacks one, as
    that without re-estimation lacks the metric of that stage."""
    whole = [row for row in rows if row.status == FINISHED] or rows
    axes = [name for name in params if all(name in row.params for row in whole)]
    return axes, [name for name in metrics if all(name in row.metrics for row in whole)]


def _leave_comparison(plan: SweepPlan, log: RunLog, console: Console) -> None:
    rows = job_rows(plan.folder)
    if not rows:
        return
    try:
        files = leave_comparison(plan.label, rows, plan.folder)
    except Exception as error:  # the jobs are what counts
        logger.warning("The comparison of the sweep cannot be made: %s", error, exc_info=not isinstance(error, OSError))
        return
    for path in files:
        log.artifact(path)
    finished = sum(row.status == FINISHED for row in rows)
    log.metrics({"sweep/jobs": float(len(rows)), "sweep/finished": float(finished)})
    log.note(files[0].read_text())
    log.settle()
    console.print()
    console.print(comparison_table(plan.label, over_seeds(rows), HEADINGS, console.width))
    places = {"comparison": str(plan.folder / "comparison.md"), "report": str(plan.folder / REPORT)}
    pictures = sorted(path.name for path in files if path.suffix == ".png")
    if pictures:
        places["pictures"] = f"{plan.folder}{'/' if len(pictures) == 1 else ': '}{', '.join(pictures)}"
    if log.uri is not None and log.experiment_id is not None:
        places["MLflow"] = ui_command(log.uri, plan.folder)
        shown = [column.metric for column in result_columns(rows, HEADINGS) if not column.metric.startswith("fp32/")]
        metric, is_ascending = f"fold/{rows[0].headline.name}", not rows[0].headline.higher_is_better
        view = log.view(*_shared(rows, differing_params(rows), shown), shown, is_ascending)
        log.settle()
        places["  charts"] = compare_link(log.experiment_id, metric, is_ascending, ui_address(log.uri), view)
    if log.undelivered:
        places["not in MLflow yet"] = f"{log.undelivered} records of the sweep's own run: bnre-exp-sync {plan.folder}"
    for what, place in places.items():
        console.print(Text(f"{what}: "), Text(place, style="cyan"), sep="", soft_wrap=True)
