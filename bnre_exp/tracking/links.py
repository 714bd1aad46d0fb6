"""Where MLflow's UI shows what was logged, and who logged it."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import sys
from pathlib import Path
from urllib.parse import quote

UI_ADDRESS = "http://127.0.0.1:5000"


def user_name() -> str:
    """The user's name, or the number of one without."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user id without a name, as containers have
        return str(os.getuid())


def ui_address(uri: str) -> str:
    """Where MLflow's UI on a store is: at the server, or where :func:`ui_command` starts it."""
    return uri.rstrip("/") if uri.startswith("http") else UI_ADDRESS


def ui_command(uri: str, folder: Path) -> str:
    """The command that opens MLflow's page of a run's or a sweep's folder, or says where a server is."""
    if uri.startswith("http"):
        return f"open {uri} in a browser"
    script = Path(sys.executable).with_name("bnre-exp")
    if not script.exists():  # run from a checkout that is not installed
        command = f"{shlex.quote(sys.executable)} -m bnre_exp"
    else:
        command = "bnre-exp" if shutil.which("bnre-exp") == str(script) else shlex.quote(str(script))
    return f"{command} ui {shlex.quote(str(folder))}"


def compare_link(
    experiment_id: str, metric: str, is_ascending: bool, address: str = UI_ADDRESS, view: str | None = None
) -> str:
    """Where the UI shows an experiment's runs as charts, in the order of a metric; or a view saved under a key.

    (Sorted by a metric, the UI lists nested runs beside the others; sorted by date it folds them away.)
    """
    link = f"{address}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
    order = f"orderByKey={quote(f'metrics.`{metric}`', safe='')}&orderByAsc={str(is_ascending).lower()}"
    return f"{link}&viewStateShareKey={view}" if view else f"{link}&{order}"
