"""Where results go: the run's own metrics.jsonl first, then MLflow. The one file of the package that imports mlflow."""

from __future__ import annotations

import getpass
import json
import logging
import math
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Optional

from filelock import FileLock

from bnre_exp.errors import UserError

LONGEST_PARAM, LONGEST_TAG = 6000, 5000  # characters that MLflow takes
UI_ADDRESS = "http://127.0.0.1:5000"

logger = logging.getLogger(__name__)


class RunLog:
    """One run: metrics to ``metrics.jsonl`` first and then to MLflow, everything else to MLflow.

    run_id, experiment_id, uri: of MLflow, None without it. undelivered: calls that MLflow did not take; what they held
    is in the local file.
    """

    def __init__(self, run_dir: Path, lines: IO[str]) -> None:
        self.run_dir, self._lines = run_dir, lines
        self.run_id: Optional[str] = None
        self.experiment_id: Optional[str] = None
        self.uri: Optional[str] = None
        self.undelivered = 0
        self._client: Any = None

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics by name; ``step``: epoch of a curve. Raises ``OSError`` if the local file cannot be written."""
        now = time.time()
        self._write({"time": now, "step": step, "metrics": {name: _json_number(v) for name, v in values.items()}})

        def deliver() -> None:
            from mlflow.entities import Metric

            stamp = int(now * 1000)
            batch = [Metric(name, float(value), stamp, step) for name, value in values.items()]
            self._client.log_batch(self.run_id, metrics=batch)

        self._deliver(deliver)

    def tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._deliver(lambda: self._client.set_tag(self.run_id, key, value[:LONGEST_TAG]))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Attach a file."""
        self._deliver(lambda: self._client.log_artifact(self.run_id, str(path), folder or None))

    def dataset(self, name: str, digest: str, source: str, role: str, profile: Mapping[str, Any]) -> None:
        """Name a data set that the run reads: its digest, where it is from, and its role (train, test, …)."""

        def deliver() -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            data = Dataset(
                name=name, digest=digest[:36], source_type="code", source=json.dumps({"source": source}),
                profile=json.dumps(dict(profile)),
            )  # fmt: skip
            self._client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", role)])])

        self._deliver(deliver)

    def checkpoint(self, folder: Path, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """List a folder as a model of this run, with its metrics."""

        def deliver() -> None:
            from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

            model = self._client.create_logged_model(
                self.experiment_id, _model_name(name), self.run_id, model_type="bnre_exp folded checkpoint",
                params={_key(key): _typed(value)[:250] for key, value in params.items()},
            )  # fmt: skip
            self._client.log_model_artifacts(model.model_id, str(folder))
            self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
            stamp = int(time.time() * 1000)
            batch = [
                Metric(k, float(v), stamp, 0, model_id=model.model_id, run_id=self.run_id) for k, v in metrics.items()
            ]
            self._client.log_batch(self.run_id, metrics=batch)

        self._deliver(deliver)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def _deliver(self, call: Callable[[], None]) -> None:
        if self._client is None:
            return
        try:
            call()
        except Exception as error:
            self.undelivered += 1
            if self.undelivered == 1:
                logger.warning(
                    "MLflow did not take a record (%s: %s). The run goes on; its metrics are in %s.",
                    type(error).__name__,
                    str(error).partition("\n")[0],
                    self.run_dir / "metrics.jsonl",
                )

    def _open(self, experiment: str, uri: str, artifacts: Path) -> None:
        self._client, self.experiment_id = _connect(experiment, uri, artifacts)
        self.uri = uri

    def _end(self, status: str, error: Optional[BaseException]) -> None:
        self._write({"time": time.time(), "status": status, "error": _describe(error) if error else None})
        if error is not None:
            self.tag("error", _describe(error))
        self._deliver(lambda: self._client.set_terminated(self.run_id, status))


@contextmanager
def open_run(
    run_dir: Path,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    output_dir: Path,
    experiment: str,
    run_name: str,
    uri: Optional[str] = None,
    enabled: bool = True,
) -> Iterator[RunLog]:
    """Log to ``run_dir/metrics.jsonl`` and, if ``enabled``, to an MLflow run that ends with the block.

    uri: of the tracking server or store; None: an SQLite store ``mlflow.db`` in ``output_dir``. The run ends FINISHED,
    or KILLED when the block was interrupted (Ctrl-C, SIGTERM), or FAILED, with the exception in the tag ``error``.
    Raises ``UserError`` if MLflow cannot be opened; later failures of MLflow cost a warning only.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as lines:
        log = RunLog(run_dir, lines)
        if enabled:
            store = uri or f"sqlite:///{output_dir.absolute() / 'mlflow.db'}"
            output_dir.mkdir(parents=True, exist_ok=True)
            log._open(experiment, store, output_dir.absolute() / "mlartifacts")
            _start(log, params, tags, run_name)
        try:
            yield log
        except BaseException as error:
            interrupted = isinstance(error, (KeyboardInterrupt, GeneratorExit))
            log._end("KILLED" if interrupted else "FAILED", error)
            raise
        log._end("FINISHED", None)


def _start(log: RunLog, params: Mapping[str, Any], tags: Mapping[str, str], run_name: str) -> None:
    from mlflow.entities import Param

    own = {
        "host": socket.gethostname(), "run_dir": str(log.run_dir), "mlflow.user": getpass.getuser(),
        "mlflow.source.name": "python -m bnre_exp", "mlflow.source.type": "LOCAL",
    }  # fmt: skip
    every = {key: str(value)[:LONGEST_TAG] for key, value in {**own, **tags}.items() if value}
    run = log._client.create_run(log.experiment_id, run_name=run_name, tags=every)
    log.run_id = run.info.run_id
    entities = [Param(_key(key), _typed(value)[:LONGEST_PARAM]) for key, value in params.items()]
    for start in range(0, len(entities), 100):  # MLflow takes 100 at a time
        batch = entities[start : start + 100]
        log._deliver(lambda batch=batch: log._client.log_batch(log.run_id, params=batch))  # type: ignore[misc]


def _connect(experiment: str, uri: str, artifacts: Path) -> tuple[Any, str]:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if uri.startswith("http"):  # the defaults keep a run waiting for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):  # what matters of their errors is in ours, without stack traces
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    try:
        if not uri.startswith("sqlite:///"):
            client = MlflowClient(uri)
            return client, _experiment(client, experiment, None)
        database = Path(uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{database}.lock"):  # migrations and the creation of experiments race otherwise
            client = MlflowClient(uri)
            _write_ahead(database)
            return client, _experiment(client, experiment, artifacts.as_uri())
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"MLflow cannot be opened at {uri}: {first}\nCorrect tracking.uri, or run without MLflow: "
            "tracking.enabled=false (metrics then are in metrics.jsonl only)."
        ) from error


def _write_ahead(database: Path) -> None:
    import sqlite3

    with sqlite3.connect(database, timeout=30) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def _experiment(client: Any, name: str, artifacts: Optional[str]) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_location=artifacts))
    if found.lifecycle_stage == "deleted":
        raise UserError(f"the experiment {name!r} is deleted; restore it, or name another with tracking.experiment.")
    return str(found.experiment_id)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_TAG]


def _json_number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))


def _typed(value: Any) -> str:
    """As the user types it: null, true, [0.5, 1]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_typed(item) for item in value) + "]"
    return str(value)


def _key(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)


def _model_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in name)


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


def ui_command(uri: str) -> str:
    """The command that opens MLflow on a store, or says where a server is."""
    if uri.startswith("http"):
        return f"open {uri}"
    program = f"{shlex.quote(sys.executable)} -m mlflow ui --workers 1 --backend-store-uri {shlex.quote(uri)}"
    return f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {program}"  # job execution would take 2 GB and 20 s


def compare_link(experiment_id: str, address: str = UI_ADDRESS) -> str:
    """Where the UI shows an experiment's runs as charts."""
    return f"{address}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
