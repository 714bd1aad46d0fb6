"""One Hydra job, in the folder that it holds."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from bnre_exp.cli.compose import config_folder, identity_of, plain_config, register, typed
from bnre_exp.cli.config_files import refuse_unchosen
from bnre_exp.cli.launch import stops_raise
from bnre_exp.cli.mistakes import exit_status, explain_failure
from bnre_exp.config import Config, StoreMode
from bnre_exp.credentials import lent_credentials, redact
from bnre_exp.errors import JobFailed, UserError
from bnre_exp.files import replacing
from bnre_exp.jobs import folders
from bnre_exp.report.console import PrefixedLines

PLAIN_WIDTH = 120  # columns of a console that is a file or a pipe

logger = logging.getLogger(__name__)

# How a sweep tells its jobs, whatever the launcher, how many run on this machine, and by what names they differ.
JOBS_AT_ONCE, SWEPT = "BNRE_JOBS_AT_ONCE", "BNRE_SWEPT"


@hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
def job(composed: DictConfig) -> float | None:
    """One job, in the folder and with the logging that Hydra has set up. Returns what a search optimizes."""
    register()  # this may be another process than the command's
    info: Any = HydraConfig.get()
    run_dir = Path(info.runtime.output_dir)
    overrides = [redact(str(text)) for text in OmegaConf.to_container(info.overrides.task, resolve=False) or []]
    _conceal(run_dir / str(info.output_subdir))
    is_multirun = info.mode is RunMode.MULTIRUN
    console = open_console()
    if is_multirun and _is_apart(info):  # jobs share a terminal: whose line is it?
        console = open_console(PrefixedLines(sys.stdout, f"[{info.job.num}] "))
    label = f"{info.job.num}: {' '.join(overrides)}" if is_multirun else " ".join(overrides)
    try:
        if is_multirun:
            console.rule(Text(f"job {label}"))
        return _claimed(composed, info, run_dir, overrides, label, console)
    except BaseException as error:
        tell(error, run_dir, way_on(composed, info) if isinstance(error, KeyboardInterrupt) else "")
        if not is_multirun:
            raise SystemExit(exit_status(error)) from None
        record = folders.read_record(run_dir)
        if is_grid(info) and isinstance(error, Exception) and record and record.status == folders.FAILED:
            return None  # its record says so; Hydra goes on, also with batches that follow
        if _is_apart(info) and isinstance(error, (Exception, KeyboardInterrupt)):
            raise JobFailed(explain_failure(error, None).splitlines()[-1]) from None
        error.__dict__["is_told"] = True
        raise  # Hydra goes on with the next job, unless this one was interrupted


def open_console(file: Any = None) -> Console:
    """Paths and overrides may hold brackets, which are no markup."""
    return Console(file=file, width=None if file is None and sys.stdout.isatty() else PLAIN_WIDTH, markup=False)


def _is_apart(info: DictConfig) -> bool:
    """Whether the launcher runs jobs in other processes than the command's."""
    return not str(info.launcher.get("_target_", "")).endswith(".BasicLauncher")


def _claimed(
    composed: DictConfig, info: DictConfig, run_dir: Path, overrides: Sequence[str], label: str, console: Console
) -> float | None:
    """Run the job as the one that holds its folder; a job of a sweep that is continued may be finished already."""
    from bnre_exp.jobs.sweep import make_room

    identity, sweep = identity_of(composed), Path(info.sweep.dir) if info.mode is RunMode.MULTIRUN else None

    def wait() -> None:
        console.print(f"  a process of the interrupted command is still at it in {run_dir}; waiting", highlight=False)

    with folders.claim(run_dir, wait if sweep is not None else None):
        before, around = folders.read_record(run_dir), folders.read_record(sweep) if sweep is not None else None
        finished = before if before and before.identity == identity and before.status == folders.FINISHED else None
        if finished and around and finished.started >= around.started:  # in this very sweep
            console.print(f"  finished already: {run_dir}", highlight=False)
            return _objective(run_dir, info, composed.objective)
        if before is not None and (before.identity != identity or before.status in (folders.FINISHED, folders.FAILED)):
            make_room(run_dir)  # another run's, in a folder that the user chose, or one that failed
        with folders.recorded(run_dir, identity, label) as record:
            try:
                with stops_raise():
                    refuse_unchosen(info.runtime.choices)
                    config = typed(composed)
                    config.runtime.threads = config.runtime.threads or _threads()
                    with lent_credentials(config.tracking.uri) as config.tracking.uri:
                        _run(config, run_dir, overrides, console, sweep)
                    objective = _objective(run_dir, info, config.objective)
                record.status = folders.FINISHED
                return objective
            except BaseException as error:
                record.status = folders.FAILED if isinstance(error, Exception) else folders.KILLED
                record.error, record.exit_status = explain_failure(error, None).splitlines()[-1], exit_status(error)
                raise


def _run(config: Config, run_dir: Path, overrides: Sequence[str], console: Console, sweep: Path | None) -> None:
    (run_dir / "config.yaml").write_text(redact(OmegaConf.to_yaml(OmegaConf.structured(config))))
    from bnre_exp.jobs.run import run  # late: neither --help nor a mistyped option needs to wait for it

    record = folders.read_record(sweep) if sweep is not None else None
    run(
        config, run_dir=run_dir, overrides=overrides, console=console, parent=sweep if record else None,
        since=record.started if record else None, differing=_differing(overrides) if record else "",
        default=plain_config(),
    )  # fmt: skip


def _differing(overrides: Sequence[str]) -> str:
    """What a job of a sweep has that others have not: quant=w3a8 num_batches=0."""
    from bnre_exp.report.comparison import short_names  # late: it imports torch

    given = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    swept = {name: given[name] for name in os.environ.get(SWEPT, "").split() if name in given}
    short = short_names(list(swept))
    return " ".join(f"{short[name]}={value}" for name, value in swept.items())


def _conceal(written: Path) -> None:
    """Take credentials out of Hydra's own files, and out of what is logged from now on: where a group is swept, they
    are known no earlier."""
    for path in written.glob("*.yaml"):
        text = path.read_text()
        if redact(text) != text:
            with replacing(path) as new:
                new.write_text(redact(text))
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Redacting(handler.formatter or logging.Formatter()))


class _Redacting(logging.Formatter):
    """Another formatter's text, tracebacks included, without credentials."""

    def __init__(self, of: logging.Formatter) -> None:
        super().__init__()
        self._of = of

    def format(self, record: logging.LogRecord) -> str:
        return redact(self._of.format(record))


def _objective(run_dir: Path, info: DictConfig, name: str | None) -> float | None:
    """What a search such as Optuna's optimizes; None if this is no search and there is no such metric."""
    from bnre_exp.jobs.reporting import headline_of
    from bnre_exp.tracking.journal import all_tags, last_metrics, read_records

    records = read_records(run_dir)
    metrics, name = last_metrics(records), name or f"fold/val_{headline_of(all_tags(records)).name}"
    value = metrics.get(name)
    if not is_grid(info) and (value is None or not math.isfinite(value)):
        raise UserError(f"objective={name}: the run has no such number. It has {', '.join(sorted(metrics))}.")
    return value


def is_grid(info: DictConfig) -> bool:
    """Whether jobs are a grid, numbered alike every time, and no search."""
    return str(info.sweeper.get("_target_", "")).endswith(".BasicSweeper")


def _threads() -> int | None:
    """CPU threads for a job beside which others of its sweep run; None: as many as torch takes."""
    given, beside = os.environ.get("SLURM_CPUS_PER_TASK", ""), int(os.environ.get(JOBS_AT_ONCE, "1"))
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, cores() // beside) if beside > 1 else None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def way_on(composed: DictConfig, info: DictConfig) -> str:
    """How an interrupted command can go on."""
    if info.mode is RunMode.MULTIRUN and not is_grid(info):
        return "Repeating the command starts a new search."
    if composed.store.mode is StoreMode.off and info.mode is not RunMode.MULTIRUN:
        return "With store=off, repeating the command starts from the beginning."
    is_anew = composed.store.mode is StoreMode.refresh and info.mode is not RunMode.MULTIRUN
    return "" if is_anew else "Repeat the command to go on where it stopped."


def tell(error: BaseException, run_dir: Path | None, advice: str = "") -> None:
    """One message on stderr; the whole traceback in the job's log, and on stderr only if it is our defect."""
    logger.info("The job stopped.", exc_info=error)  # the console handler shows warnings and above
    log_file = run_dir / "bnre_exp.log" if run_dir is not None else None
    # Rich turns a broken pipe on standard output into a SystemExit
    is_unread = isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
    text = "Stopped: what read the output has closed it." if is_unread else explain_failure(error, log_file)
    sys.stderr.write(f"{text} {advice}".rstrip() + "\n")
    metrics = run_dir / "metrics.jsonl" if run_dir is not None else None
    if metrics is not None and metrics.exists() and '"metrics"' in metrics.read_text():
        sys.stderr.write(f"What was finished is in {run_dir}\n")
