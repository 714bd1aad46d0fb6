"""Where results go: the run's own metrics.jsonl first, then MLflow. The one file of the package that imports mlflow."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Optional

from filelock import FileLock

from bnre_exp.errors import UserError
from bnre_exp.provenance import user_name
from bnre_exp.typed_text import as_params, metric_key, model_name

LONGEST_TAG = 5000  # characters that MLflow takes
PATIENCE = 3.0  # seconds that a call waits for a locked store; MLflow itself waits 20

logger = logging.getLogger(__name__)


class RunLog:
    """One run: metrics to ``metrics.jsonl`` first and then to MLflow, everything else to MLflow.

    run_id, experiment_id, uri: of MLflow, None without it. undelivered: calls that MLflow did not take; what they held
    is in the local file.
    """

    def __init__(self, run_dir: Path, lines: IO[bytes]) -> None:
        self.run_dir, self._lines = run_dir, lines
        self.run_id: Optional[str] = None
        self.experiment_id: Optional[str] = None
        self.uri: Optional[str] = None
        self.undelivered = 0
        self._client: Any = None
        self._database: Optional[Path] = None

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics by name; ``step``: epoch of a curve. Raises ``OSError`` if the local file cannot be written."""
        now = time.time()
        self._write({"time": now, "step": step, "metrics": {name: _json_number(v) for name, v in values.items()}})

        def deliver() -> None:
            from mlflow.entities import Metric

            stamp = int(now * 1000)
            batch = [Metric(metric_key(name), float(value), stamp, step) for name, value in values.items()]
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
                self.experiment_id, model_name(name), self.run_id, model_type="bnre_exp folded checkpoint",
                params={key: value[:250] for key, value in as_params(params).items()},
            )  # fmt: skip
            self._client.log_model_artifacts(model.model_id, str(folder))
            self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
            stamp = int(time.time() * 1000)
            batch = [
                Metric(metric_key(k), float(v), stamp, 0, model_id=model.model_id, run_id=self.run_id)
                for k, v in metrics.items()
            ]
            self._client.log_batch(self.run_id, metrics=batch)

        self._deliver(deliver)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Log a table, which MLflow shows as one; ``name`` ends in .json, columns are of equal length."""
        self._deliver(lambda: self._client.log_table(self.run_id, dict(columns), name))

    def _write(self, record: Mapping[str, Any]) -> None:
        line, start = (json.dumps(record) + "\n").encode(), self._lines.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._lines.write(line) :]
            os.fsync(self._lines.fileno())
        except OSError:
            with suppress(OSError):  # half a line would spoil the next one
                self._lines.truncate(start)
            raise

    def _deliver(self, call: Callable[[], None]) -> None:
        if self._client is None:
            return
        try:
            if self._database is not None:
                _probe(self._database, PATIENCE)
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

    def _end(self, status: str, error: Optional[BaseException]) -> None:
        described = _describe(error) if error else None
        try:
            self._write({"time": time.time(), "status": status, "error": described})
        except OSError:
            if error is None:
                status, described = "FAILED", "OSError: the end of the run could not be written to metrics.jsonl"
                raise
        finally:  # a full disk must neither hide the error nor leave the run RUNNING
            if described is not None:
                self.tag("error", described)
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
    # Unbuffered: after a failed write nothing is left over that closing the file would try to write again.
    with open(run_dir / "metrics.jsonl", "ab", buffering=0) as lines:
        log = RunLog(run_dir, lines)
        if enabled:
            store = _absolute(uri or f"sqlite:///{output_dir / 'mlflow.db'}")
            output_dir.mkdir(parents=True, exist_ok=True)
            _start(log, experiment, store, output_dir.absolute() / "mlartifacts", run_name, tags)
        try:
            _log_params(log, params)
            yield log
        except BaseException as error:
            interrupted = isinstance(error, (KeyboardInterrupt, GeneratorExit))
            log._end("KILLED" if interrupted else "FAILED", error)
            raise
        log._end("FINISHED", None)


def _absolute(uri: str) -> str:
    """An SQLite store by its absolute path, so that the printed command finds it from any folder."""
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{Path(path).absolute()}"


def _start(log: RunLog, experiment: str, uri: str, artifacts: Path, name: str, tags: Mapping[str, str]) -> None:
    own = {
        "host": socket.gethostname(), "run_dir": str(log.run_dir), "mlflow.user": user_name(),
        "mlflow.source.name": "python -m bnre_exp", "mlflow.source.type": "LOCAL",
    }  # fmt: skip
    every = {key: str(value)[:LONGEST_TAG] for key, value in {**own, **tags}.items() if value}
    try:
        client, experiment_id = _connect(experiment, uri, artifacts)
        run = client.create_run(experiment_id, run_name=name, tags=every)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"MLflow cannot be opened at {uri}: {first}\nCorrect tracking.uri, or run without MLflow: "
            "tracking.enabled=false (metrics then are in metrics.jsonl only)."
        ) from error
    log.uri, log.experiment_id, log.run_id, log._client = uri, experiment_id, run.info.run_id, client
    log._database = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _log_params(log: RunLog, params: Mapping[str, Any]) -> None:
    if log.run_id is not None:
        from mlflow.entities import Param

        batch = [Param(key, value) for key, value in as_params(params).items()]
        log._deliver(lambda: log._client.log_batch(log.run_id, params=batch))  # sends 100 at a time


def _connect(experiment: str, uri: str, artifacts: Path) -> tuple[Any, str]:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if uri.startswith("http"):  # the defaults keep a run waiting for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):  # what matters of their errors is in ours, without stack traces
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    if not uri.startswith("sqlite:///"):
        client = MlflowClient(uri)
        return client, _experiment(client, experiment, None)
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):  # migrations and the creation of experiments race otherwise
        if database.exists():
            _probe(database, 30)
        client = MlflowClient(uri)
        _write_ahead(database)
        return client, _experiment(client, experiment, artifacts.as_uri())


def _write_ahead(database: Path) -> None:
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def _probe(database: Path, timeout: float) -> None:
    """Raise ``sqlite3.Error`` if the store cannot be written to within ``timeout`` seconds."""
    address = f"{database.absolute().as_uri()}?mode=rw"  # rw: a store that was removed is not made anew, empty
    with closing(sqlite3.connect(address, uri=True, timeout=timeout, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


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
