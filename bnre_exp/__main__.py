"""The command line, ``python -m bnre_exp``: compose the configuration, check it, run the job, say what went wrong.

The one file that imports Hydra. Exit status: 0, or 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM, else 1.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Optional

import hydra
from hydra._internal.utils import get_args
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from bnre_exp import runs
from bnre_exp.config import Config, RuntimeConfig, TrackingConfig
from bnre_exp.errors import JobFailed, SweepFailed, Terminated, UserError
from bnre_exp.fingerprint import digest
from bnre_exp.help import help_text, version_text
from bnre_exp.journal import last_metrics, read_records
from bnre_exp.mistakes import (
    exit_status,
    explain_choice,
    explain_configuration,
    explain_failure,
    is_full_disk,
)
from bnre_exp.report.console import PrefixedLines

PLAIN_WIDTH = 120  # columns of a console that is a file or a pipe

logger = logging.getLogger(__name__)
JOBS_AT_ONCE = "BNRE_JOBS_AT_ONCE"  # how a sweep tells its jobs, whatever the launcher, how many run on this machine
INFORMATION = ("hydra_help", "cfg", "info", "shell_completion", "experimental_rerun")  # flags that run no job


def config_folder() -> Path:
    """The folder of the config groups: inside the package where a wheel installed it, else beside the package."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def _register() -> None:
    schema = OmegaConf.structured(Config)
    for section in (schema.model, schema.dataset):  # a builder's own arguments are open: model.kwargs.width=2
        OmegaConf.set_struct(section.kwargs, False)
    ConfigStore.instance().store(name="config_schema", node=schema)
    OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)


def typed(composed: DictConfig) -> Config:
    """The composed configuration as checked dataclasses. Raises ``UserError`` for an unknown key or a bad value."""
    try:
        # Plain values: merging two structured configurations would drop an unknown key (+quant.foo=1) silently.
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except OmegaConfBaseException as error:
        raise UserError(explain_configuration(error)) from error
    if not isinstance(config, Config):
        raise TypeError(f"expected a Config, got {type(config).__name__}")
    return config


def compose_config(overrides: Sequence[str]) -> Config:
    """The checked configuration that the command line would run with these overrides. Raises ``UserError``."""
    _register()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
            composed = hydra.compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise _mistake(error) from error
    return typed(composed)


def _mistake(error: BaseException) -> BaseException:
    """Hydra's and OmegaConf's complaints about the configuration as a ``UserError``; any other error as it is."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return UserError(explain_choice(error.missing_cfg_file, error.options or []))
    if isinstance(error, (HydraException, OmegaConfBaseException)) or _is_hydras_value_error(error):
        return UserError(explain_configuration(error))
    # Hydra makes the run folder before the job starts
    if isinstance(error, OSError) and error.filename and not is_full_disk(error):
        return UserError(
            f"cannot write to {error.filename}: {error.strerror}. Set runtime.output_dir, or BNRE_OUTPUT_DIR, to a "
            "folder that can be written."
        )
    return error


def _is_hydras_value_error(error: BaseException) -> bool:
    """Hydra refuses quant=3, where quant is a group, by a plain ValueError."""
    if type(error) is not ValueError:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("hydra._internal.")


@hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
def _job(composed: DictConfig) -> Optional[float]:
    """One job, in the folder and with the logging that Hydra has set up. Returns what a search optimizes."""
    _register()  # this may be another process than the command's
    info: Any = HydraConfig.get()
    run_dir = Path(info.runtime.output_dir)
    overrides = [str(text) for text in OmegaConf.to_container(info.overrides.task, resolve=False) or []]
    is_multirun = info.mode is RunMode.MULTIRUN
    console = _console()
    if is_multirun and _is_apart(info):  # jobs share a terminal: whose line is it?
        console = _console(PrefixedLines(sys.stdout, f"[{info.job.num}] "))
    label = f"{info.job.num}: {' '.join(overrides)}" if is_multirun else " ".join(overrides)
    try:
        with _sigterm_raises():
            if is_multirun:
                console.rule(Text(f"job {label}"))
            return _claimed(composed, info, run_dir, overrides, label, console)
    except BaseException as error:
        _tell(error, run_dir)
        if not is_multirun:
            raise SystemExit(exit_status(error)) from None
        record = runs.read_record(run_dir)
        if _is_plain(info) and isinstance(error, Exception) and record and record.status == runs.FAILED:
            return None  # its record says so; Hydra goes on, also with batches that follow
        if _is_apart(info) and isinstance(error, (Exception, KeyboardInterrupt)):
            raise JobFailed(explain_failure(error, None).splitlines()[-1]) from None
        error.__dict__["is_told"] = True
        raise  # Hydra goes on with the next job, unless this one was interrupted


def _console(file: Any = None) -> Console:
    """Paths and overrides may hold brackets, which are no markup."""
    return Console(file=file, width=None if file is None and sys.stdout.isatty() else PLAIN_WIDTH, markup=False)


def _is_apart(info: DictConfig) -> bool:
    """Whether the launcher runs jobs in other processes than the command's."""
    return not str(info.launcher.get("_target_", "")).endswith(".BasicLauncher")


def _claimed(
    composed: DictConfig, info: DictConfig, run_dir: Path, overrides: Sequence[str], label: str, console: Console
) -> Optional[float]:
    """Run the job as the one that holds its folder; a job of a sweep that is continued may be finished already."""
    from bnre_exp.sweep import make_room

    identity, sweep = _identity(composed), Path(info.sweep.dir) if info.mode is RunMode.MULTIRUN else None

    def wait() -> None:
        console.print(f"  a process of the interrupted command is still at it in {run_dir}; waiting", highlight=False)

    with runs.claim(run_dir, wait if sweep is not None else None):
        before, around = runs.read_record(run_dir), runs.read_record(sweep) if sweep is not None else None
        finished = before if before and before.identity == identity and before.status == runs.FINISHED else None
        if finished and around and finished.started >= around.started:  # in this very sweep
            console.print(f"  finished already: {run_dir}", highlight=False)
            return _objective(last_metrics(read_records(run_dir)), info, str(composed.objective))
        if before is not None and (before.identity != identity or before.status in (runs.FINISHED, runs.FAILED)):
            make_room(run_dir)  # another run's, in a folder that the user chose, or one that failed
        with runs.recorded(run_dir, identity, label) as record:
            try:
                config = typed(composed)
                config.runtime.threads = config.runtime.threads or _threads()
                objective = _objective(_run(config, run_dir, overrides, console, sweep), info, config.objective)
                record.status = runs.FINISHED
                return objective
            except BaseException as error:
                record.status = runs.FAILED if isinstance(error, Exception) else runs.KILLED
                record.error, record.exit_status = explain_failure(error, None).splitlines()[-1], exit_status(error)
                raise


def _run(
    config: Config, run_dir: Path, overrides: Sequence[str], console: Console, sweep: Optional[Path]
) -> dict[str, float]:
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    from bnre_exp import pipeline  # late: neither --help nor a mistyped option needs to wait for it

    record = runs.read_record(sweep) if sweep is not None else None
    results = pipeline.run(
        config, run_dir=run_dir, overrides=overrides, console=console, parent=sweep if record else None,
        since=record.started if record else None,
    )  # fmt: skip
    return results.metrics


def _identity(composed: DictConfig) -> str:
    """Of a configuration, without Hydra's own part, and of the code that it runs."""
    from bnre_exp.plan import code_identity

    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    try:
        code = code_identity(typed(own))
    except UserError:  # a mistake, which is told where it matters
        code = ""
    return digest([_container(own), code])


def _container(composed: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(composed, resolve=False, enum_to_str=True)
    return dict(plain)


def _objective(metrics: dict[str, float], info: DictConfig, name: str) -> Optional[float]:
    """What a search such as Optuna's optimizes; None if this is no search and there is no such metric."""
    value = metrics.get(name)
    if not _is_plain(info) and (value is None or not math.isfinite(value)):
        raise UserError(f"objective={name}: the run has no such number. It has {', '.join(sorted(metrics))}.")
    return value


def _is_plain(info: DictConfig) -> bool:
    """Whether jobs are a grid, numbered alike every time, and no search."""
    return str(info.sweeper.get("_target_", "")).endswith(".BasicSweeper")


def _threads() -> Optional[int]:
    """CPU threads for a job beside which others of its sweep run; None: as many as torch takes."""
    given, beside = os.environ.get("SLURM_CPUS_PER_TASK", ""), int(os.environ.get(JOBS_AT_ONCE, "1"))
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, _cores() // beside) if beside > 1 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tell(error: BaseException, run_dir: Optional[Path]) -> None:
    """One message on stderr; the whole traceback in the job's log, and on stderr only if it is our defect."""
    logger.info("The job stopped.", exc_info=error)  # the console handler shows warnings and above
    log_file = run_dir / "bnre_exp.log" if run_dir is not None else None
    # Rich turns a broken pipe on standard output into a SystemExit
    is_unread = isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
    text = "Stopped: what read the output has closed it." if is_unread else explain_failure(error, log_file)
    sys.stderr.write(text + "\n")
    metrics = run_dir / "metrics.jsonl" if run_dir is not None else None
    if metrics is not None and metrics.exists() and '"metrics"' in metrics.read_text():
        sys.stderr.write(f"What was finished is in {run_dir}\n")


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the job as Ctrl-C does, so that files and the MLflow run are closed."""

    def stop(signum: int, frame: Optional[FrameType]) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class _Ahead:
    """What Hydra is about to do. composed: the configuration without what is swept; folder: an interrupted one to go
    on with, None for a new one."""

    composed: DictConfig
    overrides: Sequence[str]
    is_multirun: bool
    identity: str
    tracking: TrackingConfig
    runtime: RuntimeConfig
    folder: Optional[Path]
    jobs_at_once: int


def _look_ahead(arguments: Any) -> Optional[_Ahead]:
    """Compose as Hydra will, to find the folder to go on with; None where Hydra itself should say what is wrong."""
    main_folder = os.path.abspath(arguments.config_path or str(config_folder()))
    with hydra.initialize_config_dir(version_base="1.3", config_dir=main_folder):
        written = OverridesParser.create().parse_overrides(list(arguments.overrides))
        fixed = [override.input_line for override in written if not override.is_sweep_override()]
        if arguments.config_dir:
            fixed.append(f"hydra.searchpath=['file://{os.path.abspath(arguments.config_dir)}']")
        name = arguments.config_name or "config"
        try:
            composed = hydra.compose(name, overrides=[str(o) for o in fixed], return_hydra_config=True)
        except MissingConfigException:
            if arguments.config_name or arguments.config_path:  # Hydra may know where it is
                return None
            raise
    is_multirun = bool(arguments.multirun) or composed.hydra.mode is RunMode.MULTIRUN
    if not is_multirun and len(fixed) != len(written):
        return None
    tracking, runtime = _section(composed, "tracking", TrackingConfig), _section(composed, "runtime", RuntimeConfig)
    identity, output = _identity(composed), Path(runtime.output_dir)
    if is_multirun:
        swept = [o for o in written if not o.key_or_group.startswith(("hydra/launcher", "hydra.launcher"))]
        typed_in = sorted(str(o.input_line) for o in swept)
        identity = digest([identity, typed_in, _container(composed.hydra.sweeper)])
    may_go_on = (not is_multirun or _is_plain(composed.hydra)) and not _chosen_folder(arguments)
    parent = output / ("multirun" if is_multirun else "runs")
    folder = runs.find_unfinished(parent, identity) if may_go_on else None
    _close_dead(output, folder)
    at_once = _jobs_at_once(composed.hydra, written) if is_multirun else 1
    return _Ahead(composed, list(arguments.overrides), is_multirun, identity, tracking, runtime, folder, at_once)


def _jobs_at_once(info: DictConfig, written: Sequence[Any]) -> int:
    """How many jobs the launcher runs on this machine at the same time, 1 where it does not run them here."""
    target, sweeper = str(info.launcher.get("_target_", "")), info.sweeper
    if not target.endswith(("JoblibLauncher", "LocalLauncher")):
        return 1
    params = [f"{key}={value}" for key, value in dict(sweeper.get("params") or {}).items()]
    swept = {o.get_key_element(): o for o in [*OverridesParser.create().parse_overrides(params), *written]}
    jobs = int(sweeper.get("n_jobs") or 1)
    if _is_plain(info):
        jobs = math.prod(len(list(o.sweep_string_iterator())) for o in swept.values() if o.is_discrete_sweep())
        jobs = min(jobs, int(sweeper.get("max_batch_size") or jobs))
    if target.endswith("JoblibLauncher"):
        cores, wanted = _cores(), int(info.launcher.get("n_jobs") or 1)
        jobs = min(jobs, wanted if wanted > 0 else max(1, cores + 1 + wanted))
    return max(1, jobs)


def _chosen_folder(arguments: Any) -> bool:
    """Whether the user says where the job or sweep goes."""
    return any(str(o).lstrip("+").startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for o in arguments.overrides)


def _section(composed: DictConfig, name: str, kind: Any) -> Any:
    plain = OmegaConf.to_container(composed[name], resolve=True, throw_on_missing=True)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))


def _close_dead(output: Path, spared: Optional[Path]) -> None:
    """Runs that were killed and that this command does not go on with are closed; their own command may reopen them."""
    multirun = output / "multirun"
    sweeps = [path for path in multirun.iterdir() if path.is_dir()] if multirun.is_dir() else []
    dead = runs.find_abandoned([output / "runs", multirun, *sweeps])
    dead = [folder for folder in dead if spared is None or (folder != spared and folder.parent != spared)]
    if dead:
        from bnre_exp.sweep import close_if_dead  # late: it imports MLflow's file

        for folder in dead:
            close_if_dead(folder)


def _launch(arguments: Any) -> None:
    """Hand over to Hydra, with the folder chosen: a job, or a sweep inside its own run."""
    ahead = _look_ahead(arguments)
    if ahead is None or (ahead.folder is None and not ahead.is_multirun):
        _job()
        return
    console = _console()
    if ahead.folder is not None:
        console.print(f"Going on with what was interrupted: {ahead.folder}", highlight=False, soft_wrap=True)
    if not ahead.is_multirun:
        sys.argv += [_quoted("hydra.run.dir", ahead.folder)]
        _job()
        return
    folder = Path(str(ahead.composed.hydra.sweep.dir)).absolute() if ahead.folder is None else ahead.folder
    sys.argv += [] if _chosen_folder(arguments) else [_quoted("hydra.sweep.dir", folder)]
    _sweep(ahead, folder, console)


def _quoted(name: str, folder: Optional[Path]) -> str:
    text = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return f"{name}='{text}'"


def _sweep(ahead: _Ahead, folder: Path, console: Console) -> None:
    from bnre_exp.sweep import SweepPlan, make_room, run_sweep

    experiment = ahead.composed.hydra.runtime.choices.get("experiment")
    swept = [o for o in ahead.overrides if OverridesParser.create().parse_override(o).is_sweep_override()]
    label = ahead.tracking.run_name or " ".join([str(experiment) if experiment else "sweep", *swept])
    os.environ[JOBS_AT_ONCE] = str(ahead.jobs_at_once)
    plan = SweepPlan(folder, ahead.identity, label[:250], ahead.overrides, ahead.tracking, ahead.runtime)
    with runs.claim(folder):
        before = runs.read_record(folder)
        if before is not None and (before.identity != ahead.identity or before.status in (runs.FINISHED, runs.FAILED)):
            make_room(folder)  # another sweep's, in a folder that the user chose
        with runs.recorded(folder, ahead.identity, label) as record:
            try:
                run_sweep(plan, _job, console)
                record.status = runs.FINISHED
            except BaseException as error:
                record.status = runs.FAILED if isinstance(error, Exception) else runs.KILLED
                record.error = explain_failure(error, None).splitlines()[-1]
                raise


def _tell_failed_jobs(folder: Path) -> int:
    from bnre_exp.sweep import failed_jobs

    failed = [record for _, record in failed_jobs(folder)]
    lines = [f"  {record.label}\n    {record.error}" for record in failed]
    sys.stderr.write("\n".join([f"{len(lines)} job(s) of this multirun failed:", *lines]) + "\n")
    return max((record.exit_status or 1 for record in failed), key=lambda status: status == 1)


def _refuse_removals(arguments: Sequence[str]) -> None:
    """~quant would compose, and leave the values of the schema, which no group file and no help text names."""
    for argument in arguments:
        if argument.startswith("~") and not argument.startswith("~hydra"):
            name = argument[1:].partition("=")[0]
            raise UserError(
                f"{argument}: it cannot be removed from the configuration; choose another value, such as {name}=off "
                "for the groups that have it (qat, reest, store, tracking, train)."
            )


def _print(text: str) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # --help | head
        return _stop_output()
    return 0


def _stop_output() -> int:
    """Nobody reads standard output any more: the interpreter's last flush must not complain. The exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def main() -> int:
    """Run the command line in ``sys.argv``; returns the exit status."""
    arguments = sys.argv[1:]
    for flags, text in (({"--help", "-h"}, help_text), ({"--version"}, version_text)):
        if flags & set(arguments):
            return _print(text(config_folder()))
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach this function, which words them
    logging.raiseExceptions = False  # a full disk must not add a traceback of the log file's own
    _register()
    try:
        _refuse_removals(arguments)
        parsed = get_args(arguments)
        with _sigterm_raises():
            if any(getattr(parsed, name) for name in INFORMATION):
                _job()
            else:
                _launch(parsed)
    except SweepFailed as error:
        return _tell_failed_jobs(error.folder)
    except SystemExit as stop:  # a job that failed and said so, or Hydra's command-line parser
        return exit_status(stop)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):  # --cfg job | head
            return _stop_output()
        mistake = _mistake(error)
        if not error.__dict__.get("is_told"):
            _tell(mistake, None)
        return exit_status(mistake)
    return 0


if __name__ == "__main__":
    sys.exit(main())
