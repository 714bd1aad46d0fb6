"""Where MLflow's UI shows what was logged, and who logged it."""

from __future__ import annotations

import getpass
import os
import shlex
import sys
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


def ui_command(uri: str) -> str:
    """The command that opens MLflow on a store, or says where a server is."""
    if uri.startswith("http"):
        return f"open {uri} in a browser"
    program = f"{shlex.quote(sys.executable)} -m mlflow ui --workers 1 --backend-store-uri {shlex.quote(uri)}"
    return f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {program}"  # job execution would take 2 GB and 20 s


def compare_link(
    experiment_id: str, metric: str, is_ascending: bool, address: str = UI_ADDRESS, view: str | None = None
) -> str:
    """Where the UI shows an experiment's runs as charts, in the order of a metric; or a view saved under a key.

    (Sorted by a metric, the UI lists nested runs beside the others; sorted by date it folds them away.)
    """
    link = f"{address}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
    order = f"orderByKey={quote(f'metrics.`{metric}`', safe='')}&orderByAsc={str(is_ascending).lower()}"
    return f"{link}&viewStateShareKey={view}" if view else f"{link}&{order}"
