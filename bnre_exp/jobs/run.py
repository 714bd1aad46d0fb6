"""One job, the main path: stage after stage, found in the store or computed, and what each reports."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from bnre_exp.config import Config, flatten
from bnre_exp.files import sweep_work
from bnre_exp.jobs.plan import Planned
from bnre_exp.jobs.prepare import open_store, prepare
from bnre_exp.jobs.provenance import git_tags
from bnre_exp.jobs.reporting import Job, Results, leave_report
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.network import STATE, Result
from bnre_exp.jobs.stages.outcome import Outcome, read_outcome, write_outcome
from bnre_exp.jobs.stages.setting import run_name
from bnre_exp.jobs.stages.snapshots import SnapshotFolder
from bnre_exp.jobs.store import Entry, Slot
from bnre_exp.report.summary import print_summary
from bnre_exp.tracking import open_run


def run(
    config: Config,
    *,
    run_dir: Path,
    overrides: Sequence[str] = (),
    console: Console,
    parent: Path | None = None,
    since: float | None = None,
    differing: str = "",
    default: Config | None = None,
) -> Results:
    """Run all stages of one job; everything it leaves is below ``run_dir``, in the store and in MLflow.

    parent: folder of the sweep that the job is part of. since: when the command began (seconds since 1970), for
    ``store.mode=refresh``; None: now. differing: what the run of a sweep has that the others have not. default: what a
    command without overrides would have been, for the report to say what differs.

    Raises ``UserError`` for a user's mistake, before training wherever it can be told before. What is finished by then
    stays: metrics in ``metrics.jsonl`` and MLflow, results in the store, the trained network in ``fp32.safetensors``.
    """
    sweep_work(Path(tempfile.gettempdir()))  # what killed jobs left
    tracking = config.tracking
    name = tracking.run_name or f"{differing} {run_name(config)}".strip()  # what differs first: lists cut names short
    code = git_tags(Path.cwd()) or git_tags(Path(__file__).parent)  # the user's project, else this package's checkout
    log_to = open_run(
        run_dir, params=flatten(config), tags={**code, "overrides": " ".join(overrides)},
        output_dir=Path(config.runtime.output_dir), experiment=tracking.experiment, run_name=name, uri=tracking.uri,
        enabled=tracking.enabled, parent=parent, connect=False,
    )  # fmt: skip
    with log_to as log, open_store(config, time.time() if since is None else since) as store:
        console.print(name, style="bold", highlight=False, markup=False)
        job, stages = prepare(config, run_dir, log, console, store, name)
        log.begin()
        try:
            _run_stages(job, stages)
        except BaseException as error:
            leave_report(job, default, error)
            raise
        leave_report(job, default)
    print_summary(job.results.summary, console, with_places=parent is None)
    results = job.results
    del job
    gc.collect()  # graphs and parametrized layers are reference cycles; over a sweep they would pile up
    return results


def _run_stages(job: Job, stages: list[Planned]) -> None:
    result = Result(job.setting.built.module)
    for planned in stages:
        result = _run_stage(job, planned, result)
        if planned.stage.leave is not None:
            planned.stage.leave(job, result)
    job.log.connect()


def _run_stage(job: Job, planned: Planned, before: Result) -> Result:
    """Find or compute one stage, and report it."""
    stage = planned.stage
    with job.store.stage(stage.name, planned.depends, job.waiting(stage.name), before.content) as slot:
        if slot.entry is not None:
            outcome, result, how = *_found(job, planned, before, slot.entry), "reused"
        else:
            job.log.connect()
            outcome, result, how = _computed(job, planned, before, slot)
    job.report(stage.name, outcome, how)
    return result


def _found(job: Job, planned: Planned, before: Result, entry: Entry) -> tuple[Outcome, Result]:
    outcome = read_outcome(entry.folder)
    _copy(outcome.files, entry.folder, job.run_dir)
    restore = partial(planned.stage.form.restore, job.setting, entry.folder, before)
    return outcome, Result(None, entry.folder, _content(entry, before), restore)


def _computed(job: Job, planned: Planned, before: Result, slot: Slot) -> tuple[Outcome, Result, str]:
    stage, started = planned.stage, time.perf_counter()
    snapshots = SnapshotFolder(slot.partial) if slot.partial is not None else None
    given = Given(before.take(), planned.before, job.run_dir, snapshots)
    outcome, network = stage.run(job.setting, given)
    outcome.metrics[f"{stage.name}/total_seconds"] = time.perf_counter() - started  # with its evaluation

    def fill(folder: Path) -> None:
        write_outcome(folder, outcome)
        stage.form.keep(folder, network)
        _copy(outcome.files, job.run_dir, folder)

    entry = slot.write(planned.config, fill)
    result = Result(network, entry.folder if entry else None, _content(entry, before) if entry else None)
    return outcome, result, "resumed" if snapshots is not None and snapshots.resumed else "computed"


def _content(entry: Entry, before: Result) -> str | None:
    """SHA-256 of the network that an entry holds, or of the one that its network follows from."""
    return str(entry.files[STATE]["sha256"]) if STATE in entry.files else before.content


def _copy(names: Sequence[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).is_dir():
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.copytree(source / name, target / name)
        else:
            shutil.copyfile(source / name, target / name)
