"""The command line, ``python -m bnre_exp``: compose the configuration, check it, run the job, say what went wrong.

The one file that imports Hydra. Exit status: 0, or 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM, else 1.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Optional

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from bnre_exp.config import Config
from bnre_exp.errors import Terminated, UserError
from bnre_exp.help import help_text, version_text
from bnre_exp.mistakes import (
    exit_status,
    explain_choice,
    explain_configuration,
    explain_failure,
    is_full_disk,
)

PLAIN_WIDTH = 120  # columns of a console that is a file or a pipe

logger = logging.getLogger(__name__)

_failed_jobs: list[tuple[str, BaseException]] = []  # of a multirun in this process: the job's overrides, its error


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
def _job(composed: DictConfig) -> None:
    """One job, in the folder and with the logging that Hydra has set up."""
    info = HydraConfig.get()
    run_dir = Path(info.runtime.output_dir)
    overrides = [str(text) for text in OmegaConf.to_container(info.overrides.task, resolve=False) or []]
    is_multirun = info.mode is RunMode.MULTIRUN
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    try:
        with _sigterm_raises():
            if is_multirun:
                console.rule(f"job {info.job.num}: {' '.join(overrides)}")
            _run(typed(composed), run_dir, overrides, console)
    except BaseException as error:
        _tell(error, run_dir)
        if is_multirun and isinstance(error, Exception):  # Hydra goes on with the next job
            _failed_jobs.append((f"{info.job.num}: {' '.join(overrides)}", error))
            raise
        raise SystemExit(exit_status(error)) from None


def _run(config: Config, run_dir: Path, overrides: Sequence[str], console: Console) -> None:
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    from bnre_exp import pipeline  # late: neither --help nor a mistyped option needs to wait for it

    pipeline.run(config, run_dir=run_dir, overrides=overrides, console=console)


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


def _tell_failed_jobs() -> int:
    lines = [f"  {job}\n    {explain_failure(error, None).splitlines()[-1]}" for job, error in _failed_jobs]
    sys.stderr.write("\n".join([f"{len(lines)} job(s) of this multirun failed:", *lines]) + "\n")
    return max((exit_status(error) for _, error in _failed_jobs), key=lambda status: status == 1)


def _refuse_removals(arguments: Sequence[str]) -> None:
    """~quant would compose, and leave the values of the schema, which no group file and no help text names."""
    for argument in arguments:
        if argument.startswith("~") and not argument.startswith("~hydra"):
            name = argument[1:].partition("=")[0]
            raise UserError(
                f"{argument}: it cannot be removed from the configuration; choose another value, such as {name}=off "
                "for the groups that have it (qat, reest, tracking, train)."
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
    _failed_jobs.clear()
    _register()
    try:
        _refuse_removals(arguments)
        with _sigterm_raises():
            _job()
    except SystemExit as stop:  # a job that failed and said so, or Hydra's command-line parser
        return exit_status(stop)
    except (Exception, KeyboardInterrupt) as error:
        if _failed_jobs and isinstance(error, Exception):
            return _tell_failed_jobs()
        if isinstance(error, BrokenPipeError):  # --cfg job | head
            return _stop_output()
        mistake = _mistake(error)
        _tell(mistake, None)
        return exit_status(mistake)
    return 0


if __name__ == "__main__":
    sys.exit(main())
