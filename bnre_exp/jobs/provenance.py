"""Who ran what, and where to look at it."""

from __future__ import annotations

import getpass
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Optional
from urllib.parse import quote

UI_ADDRESS = "http://127.0.0.1:5000"


def user_name() -> str:
    """The user's name, or the number of one without."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user id without a name, as containers have
        return str(os.getuid())


def git_tags(folder: Path) -> dict[str, str]:
    """Commit, and whether tracked files differ from it, of the checkout that ``folder`` is in; empty outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git.commit": commit, "git.dirty": str(bool(changes)).lower(), "mlflow.source.git.commit": commit}


def ui_address(uri: str) -> str:
    """Where MLflow's UI on a store is: at the server, or where :func:`ui_command` starts it."""
    return uri.rstrip("/") if uri.startswith("http") else UI_ADDRESS


def ui_command(uri: str) -> str:
    """The command that opens MLflow on a store, or says where a server is."""
    if uri.startswith("http"):
        return f"open {uri} in a browser"
    program = f"{shlex.quote(sys.executable)} -m mlflow ui --workers 1 --backend-store-uri {shlex.quote(uri)}"
    return f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {program}"  # job execution would take 2 GB and 20 s


def compare_link(experiment_id: str, address: str = UI_ADDRESS, view: Optional[str] = None) -> str:
    """Where the UI shows an experiment's runs as charts, the most accurate first; or a view saved under a key.

    (Sorted by a metric, the UI lists nested runs beside the others; sorted by date it folds them away.)
    """
    link = f"{address}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
    order = f"orderByKey={quote('metrics.`fold/top1`', safe='')}&orderByAsc=false"
    return f"{link}&viewStateShareKey={view}" if view else f"{link}&{order}"
