"""What a job tells of itself while it runs: its log, its table, its report."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bnre_exp.config import Config, flatten
from bnre_exp.credentials import concealed, redact
from bnre_exp.jobs.stages.outcome import Outcome
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.jobs.store import Store
from bnre_exp.report.html import RunPage, run_page
from bnre_exp.report.layers import drift_markdown, layers_markdown, table_markdown
from bnre_exp.report.page import REPORT, write_page
from bnre_exp.report.summary import RUN_FOLDER, StageResult, Summary, markdown, without_places
from bnre_exp.report.verdict import Verdict, verdicts
from bnre_exp.tasks.classification import Classification
from bnre_exp.tasks.task import Evaluation, Headline
from bnre_exp.tracking import RunLog
from bnre_exp.tracking.journal import curves, read_records
from bnre_exp.tracking.links import compare_link, ui_address, ui_command
from bnre_exp.tracking.typed_text import LONGEST_PARAM, shortened, typed

logger = logging.getLogger(__name__)

HEADLINE = "bnre.headline"  # tag of a run: by which metric its stages are compared


@dataclass
class Results:
    """What a job measured. metrics: by MLflow name; summary: the table; evaluations: of its rows, as metrics name them;
    folded: the checkpoint's folder; drift: columns of the table of batch norms that moved; tables: others, by name."""

    metrics: dict[str, float]
    summary: Summary
    evaluations: Mapping[str, Evaluation]
    folded: Path | None = None
    drift: Mapping[str, Sequence[Any]] | None = None
    tables: dict[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)


@dataclass
class Job:
    """One job on its way."""

    config: Config
    run_dir: Path
    log: RunLog
    console: Console
    store: Store
    setting: Setting
    results: Results

    def report(self, stage: str, outcome: Outcome, how: str) -> None:
        """Log and print what a stage measured. how: "computed", "resumed" or "reused"."""
        for epoch, values in outcome.curves:
            self.metrics(values, epoch)
        for row in outcome.measured:
            self.setting.evaluations[row.stage] = row.evaluation
            value, label = row.evaluation.value, row.evaluation.headline.label
            delta = value - self.setting.evaluations[row.after].value if row.after else None
            note = "; ".join(text for text in (row.note, "" if how == "computed" else how) if text)
            loss = row.evaluation.metrics.get("loss")
            self.results.summary.stages.append(StageResult(row.label, value, delta, loss, row.seconds, note, row.stage))
            measured = {**row.evaluation.metrics, "seconds": row.seconds}
            if delta is not None:
                measured[f"delta_{row.evaluation.headline.name}"] = delta
            self.metrics({f"{row.stage}/{name}": number for name, number in measured.items()})
            self.metrics({f"{row.stage}/{name}": number for name, number in row.metrics.items()})
            change = "" if delta is None else f" ({delta:+.4f})"
            taken = "reused" if how == "reused" else f"{row.seconds:.1f} s"
            self.console.print(f"  {row.label}: {label} {value:.4f}{change}, {taken}", highlight=False)
        self.metrics(outcome.metrics)
        for heading, rows in outcome.exceptions:
            self.exceptions(heading, rows)
        title = self.results.summary.title
        if outcome.layers is not None:
            self.results.tables["layer by layer"] = outcome.layers
            self._leave_table("layer by layer", "layers", outcome.layers, layers_markdown(title, outcome.layers))
        if outcome.drift is not None:
            self.results.drift = outcome.drift
            self._leave_table("which BNs moved", "drift", outcome.drift, drift_markdown(title, outcome.drift))
        self.results.tables.update(outcome.tables)
        for name, columns in outcome.tables.items():
            self._leave_table(name, name.replace(" ", "_"), columns, table_markdown(f"{title}: {name}", columns))
        self.log.tag_once(f"stage.{stage}", how)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log metrics by their MLflow names."""
        if values:
            self.log.metrics(values, step)
            self.results.metrics.update(values)

    def exceptions(self, heading: str, rows: Sequence[tuple[str, str]]) -> None:
        """Add ``(name, reason)`` rows to the report."""
        self.results.summary.exceptions.setdefault(heading, []).extend(rows)

    def waiting(self, stage: str) -> Callable[[str], None]:
        """What says that another job computes a stage, and who."""

        def say(who: str) -> None:
            self.console.print(f"  {stage}: another job computes it ({who}); waiting", highlight=False)

        return say

    def _leave_table(self, what: str, name: str, columns: Mapping[str, Sequence[Any]], page: str) -> None:
        """A table of a stage, as a page of the run and in MLflow. what: it is, for people; name: of its files."""
        path = self.run_dir / f"{name}.md"
        path.write_text(page)
        self.log.artifact(path)
        self.log.table(f"{name}.json", columns)
        self.results.summary.places[what] = str(path)


def headline_of(tags: Mapping[str, Any]) -> Headline:
    """By which metric the stages of a run with these tags are compared; classification's where they do not say."""
    try:
        return Headline(**json.loads(tags[HEADLINE]))
    except (KeyError, TypeError, ValueError):
        return Classification.headline


def log_inputs(job: Job) -> None:
    """Log what the job works on: its task, its preprocessing, and each data set by its contents."""
    loaders, dataset = job.setting.loaders, job.config.dataset
    preprocessing = loaders.preprocessing.describe()
    headline = json.dumps(asdict(job.setting.task.headline))
    job.log.tags({"preprocessing": json.dumps(preprocessing), HEADLINE: headline})
    roles: dict[str, list[str]] = {}  # MLflow knows a data set by its name and digest: one for all roles that share it
    for role, indices in loaders.indices.items():
        contents = loaders.digests["test" if role == "test" else "train"].encode() + indices.numpy().tobytes()
        roles.setdefault(hashlib.sha256(contents).hexdigest()[:16], []).append(role)
    for digest, sharing in roles.items():
        profile = {"images": len(loaders.indices[sharing[0]]), "classes": dataset.num_classes, **preprocessing}
        name, source = dataset._target_.rpartition(".")[2], dataset.root or dataset._target_
        job.log.dataset(name, digest, source, ", ".join(sharing), profile)


def _judge(job: Job) -> list[Verdict]:
    """Whether each step helped, as far as the run has come."""
    results = job.results
    seconds = {name: results.metrics[f"{name}/seconds"] for name in results.evaluations}
    batches = {name: results.metrics[f"{name}/batches"] for name in seconds if f"{name}/batches" in results.metrics}
    found = verdicts(results.evaluations, seconds, batches)
    results.summary.verdict = [verdict.sentence for verdict in found]
    for verdict in found:
        job.metrics({f"{verdict.stage}/{name}": value for name, value in verdict.metrics.items()})
    job.log.tags({f"verdict.{verdict.stage}": verdict.word for verdict in found})
    if found:
        job.log.tags({"verdict": " ".join(results.summary.verdict)})
    return found


def leave_report(job: Job, default: Config | None, error: BaseException | None = None) -> None:
    """The report of a whole run, or of what is finished when a stage fails, with its error. default: what a command
    without overrides would have been; None where that is not known."""
    summary, log = job.results.summary, job.log
    found = _judge(job)
    log.settle()
    log.note(without_places(summary))
    summary.places[RUN_FOLDER] = str(job.run_dir)
    if log.uri is not None and log.experiment_id is not None:
        summary.places["MLflow"] = ui_command(log.uri, job.run_dir)
        headline = job.setting.task.headline
        order = f"fold/{headline.name}", not headline.higher_is_better
        summary.places["  charts"] = compare_link(log.experiment_id, *order, ui_address(log.uri))
    if log.undelivered:
        job.exceptions(
            "note", [("MLflow", f"{log.undelivered} records are not there yet: bnre-exp-sync {job.run_dir}")]
        )
    _leave_page(job, found, default, error)
    path = job.run_dir / "report.md"
    path.write_text(markdown(summary))
    log.artifact(path)
    config_file = job.run_dir / "config.yaml"
    if config_file.exists():
        log.artifact(config_file)


def _leave_page(job: Job, found: Sequence[Verdict], default: Config | None, error: BaseException | None) -> None:
    """The report with its pictures."""
    path = job.run_dir / REPORT
    try:
        write_page(path, run_page(_page_of(job, found, default, error)))
    except Exception as problem:  # it must neither cost a run nor hide why one failed
        logger.warning("%s cannot be written: %s", path, problem, exc_info=not isinstance(problem, OSError))
        return
    job.results.summary.places["report"] = str(path)
    job.log.artifact(path)


def _page_of(job: Job, found: Sequence[Verdict], default: Config | None, error: BaseException | None) -> RunPage:
    results, records = job.results, read_records(job.run_dir)
    by_step = curves(records)
    overrides = records[0].get("run", {}).get("tags", {}).get("overrides", "") if records else ""
    return RunPage(
        results.summary, job.run_dir, job.setting.task.headline, results.metrics, by_step,
        {verdict.stage: verdict.interval for verdict in found if verdict.interval is not None}, _settings(job.config),
        {} if default is None else _settings(default), overrides=overrides,
        error=None if error is None else _ending(error), drift=results.drift,
        by_batches=by_step.get(f"reest/val_{job.setting.task.headline.name}"), tables=results.tables,
    )  # fmt: skip


def _settings(config: Config) -> dict[str, str]:
    """As the user types them, by name."""
    return {name: shortened(typed(value), LONGEST_PARAM) for name, value in concealed(flatten(config)).items()}


def _ending(error: BaseException) -> tuple[str, str]:
    """Status and message of a run that did not finish."""
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "the run was interrupted"
    return "FAILED", redact(f"{type(error).__name__}: {error}")
