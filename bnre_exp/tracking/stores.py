"""Stores that MLflow keeps its data in: opened, reached within seconds, read."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bnre_exp.credentials import PASSWORD, TOKEN, USERNAME, connectable, redact, take_credentials
from bnre_exp.errors import UserError
from bnre_exp.files import replacing
from bnre_exp.tracking.filesystems import is_on_network

PATIENCE = 3.0  # seconds that a call waits for a locked or silent store; MLflow itself waits 20, or minutes
LONGEST_ANSWER = 30.0  # seconds that a server has for one answer, which no job waits for


def read_runs(uri: str, experiment: str, filter_string: str = "") -> list[Mapping[str, Any]]:
    """Runs of an experiment as ``{id, parent, name, status, params, metrics, tags}``, the oldest first, without
    deleted ones. filter_string: in MLflow's language, as ``params.model.name = 'resnet18'``. Raises ``UserError``."""
    try:
        uri = take_credentials(uri)
        client = client_of(absolute_uri(uri))
        found = client.get_experiment_by_name(experiment)
        if found is None:
            names = ", ".join(e.name for e in client.search_experiments())
            raise UserError(f"there is no experiment {experiment!r} in {uri}. Experiments: {names}.")
        runs: list[Any] = []
        token = None
        while True:
            page = client.search_runs([found.experiment_id], filter_string, 1, 1000, ["attributes.start_time"], token)
            runs, token = [*runs, *page], page.token
            if not token:
                break
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"MLflow at {uri}: {first_line(error)}") from error
    return [
        {
            "id": run.info.run_id, "parent": run.data.tags.get("mlflow.parentRunId"), "name": run.info.run_name,
            "status": run.info.status, "params": run.data.params, "metrics": run.data.metrics,
            "tags": run.data.tags,
        }
        for run in runs
    ]  # fmt: skip


def absolute_uri(uri: str) -> str:
    """An SQLite store by its absolute path, so that the printed command finds it from any folder."""
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{Path(path).absolute()}"


def database_of(uri: str) -> Path | None:
    """The file of an SQLite store, None of any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def check_reachable(uri: str, is_open: bool) -> None:
    """Raise within PATIENCE if the store does not answer; MLflow itself would hang."""
    database = database_of(uri)
    if database is not None and (is_open or database.exists()):
        _probe(database, PATIENCE)
    if uri.startswith("http:"):  # https may need settings that MLflow has
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PATIENCE):
                pass
        except urllib.error.HTTPError:  # it answers, be it that it asks for credentials, which MLflow's client has
            pass


@contextmanager
def turn(uri: str) -> Iterator[None]:
    """On a network's file system SQLite's own locks are not to be trusted: one process at a time, by a file lock."""
    database = database_of(uri)
    with ExitStack() as stack:
        if database is not None and is_on_network(database.parent):
            stack.enter_context(FileLock(f"{database}.turn", timeout=PATIENCE))
        yield


def import_client() -> Any:
    """MLflow's class of clients; importing it takes a second or two."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with _signals_wait():
        from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):  # what matters of their errors is in ours, without stack traces
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    return MlflowClient


def client_of(uri: str) -> Any:
    """MLflow's client of a store; a database is made if there is none."""
    if uri.startswith("http"):  # by default MLflow tries again for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(LONGEST_ANSWER)))
    client_class, database = import_client(), database_of(uri)
    if database is None:
        return client_class(connectable(uri))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):  # migrations race otherwise
        if not database.exists():
            _make_database(database, client_class)
        client = client_class(uri)
        if not is_on_network(database.parent):  # write-ahead needs memory that processes share
            with closing(sqlite3.connect(database, timeout=30)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        return client


def _make_database(database: Path, client_class: Any) -> None:
    """MLflow makes its tables step by step: killed in between, it leaves a database that nothing can open again."""
    try:
        with replacing(database) as new:
            made = client_class(f"sqlite:///{new}")
            with suppress(AttributeError):
                made._tracking_client.store.engine.dispose()
    finally:
        for left in database.parent.glob(f".{database.name}.*"):  # of this one, and of any that was killed
            left.unlink(missing_ok=True)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """A signal in the middle of an import would leave half a library for the rest of the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _probe(database: Path, timeout: float) -> None:
    """Raise ``sqlite3.Error`` if the store cannot be written to within ``timeout`` seconds."""
    address = f"{database.absolute().as_uri()}?mode=rw"  # rw: a store that was removed is not made anew, empty
    with closing(sqlite3.connect(address, uri=True, timeout=timeout, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


def experiment_of(client: Any, name: str, uri: str, artifacts: str) -> str:
    """Id of an experiment, made if need be. Raises ``UserError`` for one that was deleted."""
    database = database_of(uri)
    with ExitStack() as stack:
        if database is not None:  # two first runs at once
            stack.enter_context(FileLock(f"{database}.lock"))
        found = client.get_experiment_by_name(name)
        if found is None:
            found = _create_experiment(client, name, artifacts if database is not None else None)
    if found.lifecycle_stage == "deleted":
        raise UserError(f"the experiment {name!r} is deleted; restore it, or name another with tracking.experiment.")
    return str(found.experiment_id)


def _create_experiment(client: Any, name: str, artifacts: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return client.get_experiment_by_name(name)  # another process was faster


def is_busy(error: Exception) -> bool:
    """Whether another process has the store for the moment."""
    return isinstance(error, Timeout) or any(word in str(error).lower() for word in ("database is locked", "busy"))


def code_of(error: Exception) -> str | None:
    """MLflow's code of an error, None of any other."""
    return getattr(error, "error_code", None)


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    line = redact(str(error).splitlines()[0]) if str(error) else type(error).__name__
    wanted = f"; credentials are taken from {USERNAME} and {PASSWORD}, or {TOKEN}"
    return line + wanted if code_of(error) in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED") else line
