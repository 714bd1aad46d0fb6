"""The command line: launch a job or a sweep, say what went wrong.

Exit status: 0, or 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM, else 1.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console

from bnre_exp.cli.completion import complete
from bnre_exp.cli.compose import as_mistake, config_folder, refuse_removals, register
from bnre_exp.cli.config_files import mistake_in_files, own_folder
from bnre_exp.cli.help import help_text, version_text
from bnre_exp.cli.job import JOBS_AT_ONCE, SWEPT, job, open_console, tell, way_on
from bnre_exp.cli.launch import stops_raise
from bnre_exp.cli.mistakes import exit_status, explain_failure
from bnre_exp.cli.resume import Ahead, is_folder_chosen, look_ahead
from bnre_exp.credentials import arguments_without_credentials, redact
from bnre_exp.errors import SweepFailed
from bnre_exp.jobs import folders

INFORMATION = ("hydra_help", "cfg", "info", "experimental_rerun")  # flags that run no job


def _launch(arguments: Any) -> None:
    """Hand over to Hydra, with the folder chosen: a job, or a sweep inside its own run."""
    ahead = look_ahead(arguments)
    if ahead is None:
        job()
        return
    sys.argv += ahead.added
    import_module("bnre_exp.jobs.run")  # all of torch, while nothing needs to be closed when Ctrl-C ends the process
    gc.freeze()  # what libraries are made of is never garbage: no collection need look through it
    if ahead.folder is None and not ahead.is_multirun:
        job()
        return
    console = open_console()
    if ahead.folder is not None:
        console.print(f"Going on with what was interrupted: {ahead.folder}", highlight=False, soft_wrap=True)
    if not ahead.is_multirun:
        sys.argv += [_quoted("hydra.run.dir", ahead.folder)]
        job()
        return
    folder = Path(str(ahead.composed.hydra.sweep.dir)).absolute() if ahead.folder is None else ahead.folder
    sys.argv += [] if is_folder_chosen(arguments) else [_quoted("hydra.sweep.dir", folder)]
    _sweep(ahead, folder, console)


def _quoted(name: str, folder: Path | None) -> str:
    text = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return f"{name}='{text}'"


def _sweep(ahead: Ahead, folder: Path, console: Console) -> None:
    from bnre_exp.jobs.sweep import SweepPlan, make_room, run_sweep

    experiment = ahead.composed.hydra.runtime.choices.get("experiment")
    swept = [o for o in ahead.overrides if OverridesParser.create().parse_override(o).is_sweep_override()]
    label = ahead.tracking.run_name or " ".join([str(experiment) if experiment else "sweep", *swept])
    os.environ[JOBS_AT_ONCE] = str(ahead.jobs_at_once)
    names = [OverridesParser.create().parse_override(o).key_or_group for o in swept]
    os.environ[SWEPT] = " ".join([*names, *(ahead.composed.hydra.sweeper.get("params") or {})])
    plan = SweepPlan(folder, ahead.identity, label, ahead.overrides, ahead.tracking, ahead.runtime)
    with folders.claim(folder):
        before = folders.read_record(folder)
        if before is not None and (
            before.identity != ahead.identity or before.status in (folders.FINISHED, folders.FAILED)
        ):
            make_room(folder)  # another sweep's, in a folder that the user chose
        with folders.recorded(folder, ahead.identity, label) as record:
            try:
                with stops_raise():
                    record.best = run_sweep(plan, job, console)
                record.status = folders.FINISHED
            except BaseException as error:
                record.status = folders.FAILED if isinstance(error, Exception) else folders.KILLED
                record.error = explain_failure(error, None).splitlines()[-1]
                if isinstance(error, KeyboardInterrupt) and not error.__dict__.get("is_told"):  # between two jobs
                    tell(error, None, way_on(ahead.composed, ahead.composed.hydra))
                    error.__dict__["is_told"] = True
                raise


def _tell_failed_jobs(folder: Path) -> int:
    from bnre_exp.jobs.sweep import failed_jobs

    failed = [record for _, record in failed_jobs(folder)]
    lines = [f"  {record.label}\n    {record.error}" for record in failed]
    sys.stderr.write("\n".join([f"{len(lines)} job(s) of this multirun failed:", *lines]) + "\n")
    return max((record.exit_status or 1 for record in failed), key=lambda status: status == 1)


def _inform() -> None:
    """What Hydra prints of the configuration, without credentials."""
    written = io.StringIO()
    try:
        with redirect_stdout(written):
            job()
    finally:
        sys.stdout.write(redact(written.getvalue()))


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
    if "--version" in arguments:
        return _print(version_text())
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach this function, which words them
    if not {"", os.getcwd()} & set(sys.path):  # an installed command has its own folder there, python -m this one
        sys.path.insert(0, os.getcwd())
    logging.raiseExceptions = False  # a full disk must not add a traceback of the log file's own
    register()
    config_folders = [config_folder()]
    try:
        own = own_folder(arguments)
        config_folders += [own] if own is not None else []
        if {"--help", "-h"} & set(arguments):
            return _print(help_text(*config_folders))
        sys.argv[1:] = arguments = arguments_without_credentials(arguments)
        refuse_removals(arguments)
        parsed = get_args(arguments)
        if parsed.shell_completion:
            return complete(parsed.overrides, job)
        if any(getattr(parsed, name) for name in INFORMATION):
            _inform()
        else:
            _launch(parsed)
    except SweepFailed as error:
        return _tell_failed_jobs(error.folder)
    except SystemExit as stop:  # a job that failed and said so, or Hydra's command-line parser
        return exit_status(stop)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):  # --cfg job | head
            return _stop_output()
        mistake = mistake_in_files(error, config_folders, sys.argv[1:]) or as_mistake(error)
        if not error.__dict__.get("is_told"):
            tell(mistake, None)
        return exit_status(mistake)
    return 0
