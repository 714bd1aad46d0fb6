"""MLflow: what a run's journal holds is brought there, in order, each record once. The one file that imports mlflow.

Delivery may be late: a store that is down or locked costs a run a few seconds and a warning, and what is left over is
brought there by a later call, by :func:`sync`, or by any later run of the same folder. Each record is such that sending
it twice changes nothing (MLflow drops a metric of equal name, time, step and value), so a process that dies between
sending and taking note of it does no harm.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sqlite3
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

from filelock import FileLock, Timeout

from bnre_exp.charts import charts
from bnre_exp.errors import UserError
from bnre_exp.filesystems import is_on_network
from bnre_exp.journal import Journal, json_numbers, read_records
from bnre_exp.provenance import user_name
from bnre_exp.typed_text import as_params, metric_key, model_name

LONGEST_TAG = 5000  # characters that MLflow takes
PATIENCE = 3.0  # seconds that a call waits for a locked or silent store; MLflow itself waits 20, or minutes
PAUSE = 30.0  # seconds before a store that did not answer is tried again
DELIVERED, UID = "mlflow.json", "bnre.uid"
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")  # what no later attempt would change

logger = logging.getLogger(__name__)


class RunLog:
    """One run: everything goes to its journal first, and from there to MLflow.

    run_id, experiment_id: of MLflow, None without it or while it is out of reach. uri: of the store, None without it.
    """

    def __init__(self, journal: Journal, delivery: Optional[Delivery]) -> None:
        self.run_dir, self._journal, self._delivery = journal.folder, journal, delivery

    @property
    def uri(self) -> Optional[str]:
        return self._delivery.uri if self._delivery else None

    @property
    def run_id(self) -> Optional[str]:
        return self._delivery.run_id if self._delivery else None

    @property
    def experiment_id(self) -> Optional[str]:
        return self._delivery.experiment_id if self._delivery else None

    @property
    def undelivered(self) -> int:
        """Records that MLflow does not have yet."""
        return self._delivery.pending if self._delivery else 0

    def connect(self) -> None:
        """Open MLflow and bring there what the journal holds. Raises ``UserError`` if the store is no server and does
        not work, which is a mistake that should be told before any work; a server may come back."""
        if self._delivery is not None:
            self._delivery.open()

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics by name; ``step``: epoch of a curve. Raises ``OSError`` if the journal cannot be written."""
        self._add("metrics", json_numbers(values), step=step)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._add("tags", {key: str(value)[:LONGEST_TAG] for key, value in values.items()})

    def tag_once(self, key: str, value: str) -> None:
        """Set a tag, unless this run, continued, has it already."""
        if not any(key in record.get("tags", {}) for record in self._journal.records):
            self.tags({key: value})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Attach a file of the run's folder."""
        self._add("artifact", str(path.relative_to(self.run_dir)), folder=folder)

    def dataset(self, name: str, digest: str, source: str, role: str, profile: Mapping[str, Any]) -> None:
        """Name a data set that the run reads: its digest, where it is from, and its role (train, test, …)."""
        known = {"name": name, "digest": digest[:36], "source": source, "role": role, "profile": dict(profile)}
        self._add("dataset", known)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Log a table, which MLflow shows as one; ``name`` ends in .json, columns are of equal length."""
        rows = [list(cells) for cells in zip(*columns.values())]
        (self.run_dir / name).write_text(json.dumps({"columns": list(columns), "data": rows}))
        self._add("table", name)

    def checkpoint(self, folder: Path, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """List a folder below the run's as a model of this run, with its metrics."""
        short = {key: value[:250] for key, value in as_params(params).items()}
        known = {"name": name, "params": short, "metrics": json_numbers(metrics)}
        self._add("model", {"folder": str(folder.relative_to(self.run_dir)), **known})

    def view(self, params: Sequence[str], metrics: Sequence[str]) -> Optional[str]:
        """Save a view of the runs nested in this one: ``params`` against ``metrics``, and a chart of each metric.
        Returns its key for a link, None if MLflow is out of reach."""
        self._add("view", {"params": list(params), "metrics": list(metrics)})
        return None if self.run_id is None else self.run_id[:12]

    def _add(self, kind: str, value: Any, **more: Any) -> None:
        if self._journal.add(kind, value, **more) and self._delivery is not None:
            self._delivery.flush()

    def _end(self, status: str, error: Optional[BaseException]) -> None:
        described = _describe(error) if error else None
        try:
            self._journal.add("status", status, error=described)
        except OSError:
            if self._delivery is not None:  # a full disk must neither hide the error nor leave the run RUNNING
                ending = status if error else "FAILED"
                self._delivery.end_at_once(ending, described or "OSError: metrics.jsonl cannot be written")
            if error is None:
                raise
        if self._delivery is not None:
            self._delivery.flush(again=True)


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
    parent: Optional[Path] = None,
    connect: bool = True,
) -> Iterator[RunLog]:
    """Log to ``run_dir/metrics.jsonl`` and, if ``enabled``, to an MLflow run that ends with the block.

    uri: of the tracking server or store; None: an SQLite store ``mlflow.db`` in ``output_dir``. parent: folder of the
    run that this one is nested in. connect: False leaves MLflow alone until :meth:`RunLog.connect`, or the end of the
    run, since importing it takes a second. A folder that has a journal goes on with it, and with its MLflow run. The
    run ends FINISHED, or KILLED when the block was interrupted (Ctrl-C, SIGTERM), or FAILED, with the exception in the
    tag ``error``. Raises ``UserError`` if MLflow cannot be opened; a server that does not answer, and any later
    failure, costs a warning.
    """
    with Journal(run_dir) as journal:
        delivery = None
        about: dict[str, Any] = {"name": run_name, "uid": uuid.uuid4().hex, "tags": _all_tags(run_dir, tags)}
        if enabled:
            store = absolute_uri(uri or f"sqlite:///{output_dir / 'mlflow.db'}")
            output_dir.mkdir(parents=True, exist_ok=True)
            artifacts = (output_dir.absolute() / "mlartifacts").as_uri()
            about.update({"uri": store, "experiment": experiment, "artifacts": artifacts})
            about["parent"] = os.path.relpath(parent, run_dir) if parent is not None else None
        is_new = not journal.records
        journal.add("run", about) if is_new else journal.add("status", "RUNNING", error=None)
        if enabled and "uri" in journal.records[0].get("run", {}):
            delivery = Delivery(journal)
        log = RunLog(journal, delivery)
        if connect:
            log.connect()
        try:
            log._add("params", as_params(params))
            yield log
        except BaseException as error:
            interrupted = isinstance(error, (KeyboardInterrupt, GeneratorExit))
            log._end("KILLED" if interrupted else "FAILED", error)
            raise
        log._end("FINISHED", None)


def end_run(run_dir: Path, status: str) -> None:
    """Write the end of a run whose process is gone, and deliver it if MLflow can be reached."""
    with Journal(run_dir) as journal:
        if not journal.records:
            return
        journal.add("status", status, error="its process ended without a word")
        if "uri" in journal.records[0].get("run", {}):
            Delivery(journal).flush(again=True)


def sync(run_dir: Path) -> tuple[int, int]:
    """Deliver what MLflow does not have of a run; returns how many records went there, and how many are left.

    Raises ``UserError`` with the reason if the first of those left could not be delivered.
    """
    with Journal(run_dir) as journal:
        if "uri" not in (journal.records[0].get("run", {}) if journal.records else {}):
            return 0, 0
        delivery = Delivery(journal)
        before = delivery.pending
        delivery.flush(again=True)
        if delivery.pending and delivery.problem:
            raise UserError(delivery.problem)
        return before - delivery.pending, delivery.pending


def undelivered(run_dir: Path) -> int:
    """Records of a run that MLflow does not have yet; 0 for a run without MLflow."""
    records = read_records(run_dir)
    if "uri" not in (records[0].get("run", {}) if records else {}):
        return 0
    return max(0, len(records) - int(_read_note(run_dir).get("count", 0)))


def read_runs(uri: str, experiment: str, filter_string: str = "") -> list[Mapping[str, Any]]:
    """Runs of an experiment as ``{id, parent, name, status, params, metrics}``, the oldest first; deleted ones are left
    out. ``filter_string``: in MLflow's language, as ``params.model.name = 'resnet18'``. Raises ``UserError``."""
    try:
        client = _client(absolute_uri(uri))
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
        raise UserError(f"MLflow at {uri}: {_first_line(error)}") from error
    return [
        {
            "id": run.info.run_id, "parent": run.data.tags.get("mlflow.parentRunId"), "name": run.info.run_name,
            "status": run.info.status, "params": run.data.params, "metrics": run.data.metrics,
        }
        for run in runs
    ]  # fmt: skip


def absolute_uri(uri: str) -> str:
    """An SQLite store by its absolute path, so that the printed command finds it from any folder."""
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{Path(path).absolute()}"


class Delivery:
    """Brings the records of a journal to MLflow, in order. What it has brought there is noted in ``mlflow.json``.

    problem: why the last attempt ended early, None if it did not.
    """

    def __init__(self, journal: Journal) -> None:
        self.folder, self._journal = journal.folder, journal
        self.about: Mapping[str, Any] = journal.records[0]["run"]
        self.uri: str = self.about["uri"]
        self._note = _read_note(self.folder)
        self._client: Any = None
        self._is_open = self._is_checked = False
        self._next_try = 0.0
        self.problem: Optional[str] = None

    @property
    def run_id(self) -> Optional[str]:
        return self._note.get("run_id")

    @property
    def experiment_id(self) -> Optional[str]:
        return self._note.get("experiment_id")

    @property
    def pending(self) -> int:
        """Records that MLflow does not have yet."""
        return max(0, len(self._journal.records) - int(self._note.get("count", 0)))

    def open(self) -> None:
        """The first delivery. Raises ``UserError`` if the store is no server and does not work."""
        if not self._is_open:
            self._is_open = True
            self.flush(is_first=True)

    def flush(self, *, again: bool = False, is_first: bool = False) -> None:
        """Deliver what is pending; after a failure, not before a pause is over, unless ``again``."""
        if not self.pending or not (again or (self._is_open and time.monotonic() >= self._next_try)):
            return
        lock = FileLock(self.folder / "mlflow.lock")
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:  # another process delivers this folder's records
            return
        try:
            self._note = _read_note(self.folder)
            self._deliver()
            self.problem = None
        except Exception as error:
            already, self.problem = self.problem, _first_line(error)
            if is_first and (isinstance(error, UserError) or not (self.uri.startswith("http") or _is_busy(error))):
                raise UserError(
                    f"MLflow cannot be opened at {self.uri}: {_first_line(error)}\nCorrect tracking.uri, or run "
                    "without MLflow: tracking.enabled=false (metrics then are in metrics.jsonl only)."
                ) from error
            self._next_try = time.monotonic() + PAUSE
            if already is None:
                logger.warning(
                    "MLflow at %s does not take records (%s). The run goes on; what is missing there is in %s, and is "
                    "delivered when MLflow answers, or by scripts/sync_mlflow.",
                    self.uri, _first_line(error), self._journal.folder / "metrics.jsonl",
                )  # fmt: skip
        finally:
            lock.release()

    def end_at_once(self, status: str, error: str) -> None:
        """Set status and error of the run in MLflow, past the journal, which cannot be written."""
        with suppress(Exception):
            self._connect().set_tag(self.run_id, "error", error[:LONGEST_TAG])
            self._connect().set_terminated(self.run_id, status)

    def _connect(self) -> Any:
        if self._client is None:
            self._client = _client(self.uri)
        return self._client

    def _deliver(self) -> None:
        _check_reachable(self.uri, is_open=self._client is not None)
        with _turn(self.uri):
            client = self._connect()
            if not self._is_checked:
                _forget_if_gone(client, self._note)
            _ensure_run(client, self.folder, self.about, self._note)
            self._is_checked = True
            for record in self._journal.records[int(self._note["count"]) :]:
                try:
                    _send(client, self.folder, self._note, record)
                except Exception as error:
                    if _code(error) == "RESOURCE_DOES_NOT_EXIST":  # the run is gone: everything goes there again
                        self._note = {}
                        _write_note(self.folder, self._note)
                    if _code(error) not in REFUSED:
                        raise
                    _forget_if_gone(client, self._note)  # deleted in the UI: no record is refused for itself
                    logger.warning("MLflow refuses a record of %s: %s", self.folder, _first_line(error))
                self._note["count"] += 1
                _write_note(self.folder, self._note)


def _read_note(folder: Path) -> dict[str, Any]:
    try:
        note = json.loads((folder / DELIVERED).read_text())
        return note if isinstance(note, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_note(folder: Path, note: Mapping[str, Any]) -> None:
    new = folder / f".{DELIVERED}.new"
    new.write_text(json.dumps(note))
    os.replace(new, folder / DELIVERED)


def _ensure_run(client: Any, folder: Path, about: Mapping[str, Any], note: dict[str, Any]) -> None:
    """The MLflow run of a folder, and of the folder that it is nested in: found by its tag, or created."""
    if "run_id" in note:
        return
    tags = {**about["tags"], UID: about["uid"]}
    if about.get("parent"):
        tags["mlflow.parentRunId"] = _parent_run(client, folder / about["parent"])
    experiment = _experiment(client, about["experiment"], about["uri"], about["artifacts"])
    # It may be there: an answer can be lost, and so can the note.
    found = client.search_runs([experiment], f"tags.`{UID}` = '{about['uid']}'", max_results=1)
    run = found[0] if found else client.create_run(experiment, run_name=about["name"], tags=tags)
    note.update({"experiment_id": experiment, "run_id": run.info.run_id, "count": 0})
    _write_note(folder, note)


def _forget_if_gone(client: Any, note: dict[str, Any]) -> None:
    """Forget a run that MLflow does not know, whose store is another one now: everything goes there again. Raises
    ``UserError`` for one that was deleted, as in the UI."""
    from mlflow.exceptions import MlflowException

    if "run_id" not in note:
        return
    try:
        run = client.get_run(note["run_id"])
    except MlflowException as error:
        if _code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        note.clear()
        return
    if run.info.lifecycle_stage != "active":
        raise UserError(f"the run {note['run_id']} was deleted in MLflow; restore it there to have the rest of it.")


def _parent_run(client: Any, folder: Path) -> str:
    with FileLock(folder / "mlflow.lock", timeout=PATIENCE):
        note = _read_note(folder)
        _forget_if_gone(client, note)
        _ensure_run(client, folder, read_records(folder)[0]["run"], note)
    return str(note["run_id"])


def _send(client: Any, folder: Path, note: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Bring one record to MLflow; a second time, that changes nothing."""
    from mlflow.entities import Metric, Param

    run, stamp = note["run_id"], int(record["time"] * 1000)
    if "params" in record:
        client.log_batch(run, params=[Param(key, value) for key, value in record["params"].items()])
    elif "metrics" in record:
        step = int(record["step"])
        batch = [Metric(metric_key(name), float(value), stamp, step) for name, value in record["metrics"].items()]
        client.log_batch(run, metrics=batch)
    elif "tags" in record:
        for key, value in record["tags"].items():
            client.set_tag(run, key, value)
    elif "dataset" in record:
        _send_dataset(client, run, record["dataset"])
    elif "artifact" in record and (folder / record["artifact"]).exists():
        client.log_artifact(run, str(folder / record["artifact"]), record.get("folder") or None)
    elif "table" in record and (folder / record["table"]).exists():
        client.log_artifact(run, str(folder / record["table"]))
        client.set_tag(run, "mlflow.loggedArtifacts", json.dumps([{"path": record["table"], "type": "table"}]))
    elif "model" in record and (folder / record["model"]["folder"]).exists():
        _send_model(client, folder, note, record["model"], stamp)
    elif "view" in record:
        key, state = f"mlflow.sharedViewState.{run[:12]}", charts(run, **record["view"])
        client.set_experiment_tag(note["experiment_id"], key, json.dumps(state))
    elif "status" in record:
        if record.get("error"):
            client.set_tag(run, "error", record["error"])
        if record["status"] == "RUNNING":
            client.update_run(run, "RUNNING")
            with suppress(Exception):  # what it ended with before
                client.delete_tag(run, "error")
        else:
            client.set_terminated(run, record["status"], end_time=stamp)


def _send_dataset(client: Any, run: str, known: Mapping[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = Dataset(
        name=known["name"], digest=known["digest"], source_type="code", source=json.dumps({"source": known["source"]}),
        profile=json.dumps(known["profile"]),
    )  # fmt: skip
    client.log_inputs(run, [DatasetInput(data, [InputTag("mlflow.data.context", known["role"])])])


def _send_model(client: Any, folder: Path, note: Mapping[str, Any], known: Mapping[str, Any], stamp: int) -> None:
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

    run, experiment = note["run_id"], note["experiment_id"]
    found = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run}'", max_results=1)
    if found:
        model = found[0]
    else:
        model = client.create_logged_model(
            experiment, model_name(known["name"]), run, model_type="bnre_exp folded checkpoint", params=known["params"]
        )
    if str(model.status) != str(LoggedModelStatus.READY):
        client.log_model_artifacts(model.model_id, str(folder / known["folder"]))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])
    batch = [
        Metric(metric_key(k), float(v), stamp, 0, model_id=model.model_id, run_id=run)
        for k, v in known["metrics"].items()
    ]
    client.log_batch(run, metrics=batch)


def _is_busy(error: Exception) -> bool:
    """Whether another process has the store for the moment."""
    return isinstance(error, Timeout) or any(word in str(error).lower() for word in ("database is locked", "busy"))


def _code(error: Exception) -> Optional[str]:
    return getattr(error, "error_code", None)


def _all_tags(run_dir: Path, tags: Mapping[str, str]) -> dict[str, str]:
    own = {
        "host": socket.gethostname(), "run_dir": str(run_dir), "mlflow.user": user_name(),
        "mlflow.source.name": "python -m bnre_exp", "mlflow.source.type": "LOCAL",
    }  # fmt: skip
    return {key: str(value)[:LONGEST_TAG] for key, value in {**own, **tags}.items() if value}


def _database_of(uri: str) -> Optional[Path]:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _check_reachable(uri: str, is_open: bool) -> None:
    """Raise within PATIENCE if the store does not answer; MLflow itself would hang."""
    database = _database_of(uri)
    if database is not None and (is_open or database.exists()):
        _probe(database, PATIENCE)
    if uri.startswith("http:"):  # https may need settings that MLflow has
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PATIENCE):
                pass
        except urllib.error.HTTPError:  # it answers
            pass


@contextmanager
def _turn(uri: str) -> Iterator[None]:
    """On a network's file system SQLite's own locks are not to be trusted: one process at a time, by a file lock."""
    database = _database_of(uri)
    with ExitStack() as stack:
        if database is not None and is_on_network(database.parent):
            stack.enter_context(FileLock(f"{database}.turn", timeout=PATIENCE))
        yield


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if uri.startswith("http"):  # the defaults keep a run waiting for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(PATIENCE)))
    with _signals_wait():
        from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):  # what matters of their errors is in ours, without stack traces
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    database = _database_of(uri)
    if database is None:
        return MlflowClient(uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):  # migrations race otherwise
        if not database.exists():
            _make_database(database, MlflowClient)
        client = MlflowClient(uri)
        if not is_on_network(database.parent):  # write-ahead needs memory that processes share
            with closing(sqlite3.connect(database, timeout=30)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        return client


def _make_database(database: Path, client_class: Any) -> None:
    """MLflow makes its tables step by step: killed in between, it leaves a database that nothing can open again."""
    new = database.with_name(f".{database.name}.{uuid.uuid4().hex}")
    try:
        made = client_class(f"sqlite:///{new}")
        with suppress(AttributeError):
            made._tracking_client.store.engine.dispose()
        os.replace(new, database)
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


def _experiment(client: Any, name: str, uri: str, artifacts: str) -> str:
    database = _database_of(uri)
    with ExitStack() as stack:
        if database is not None:  # two first runs at once
            stack.enter_context(FileLock(f"{database}.lock"))
        found = client.get_experiment_by_name(name)
        if found is None:
            found = _create_experiment(client, name, artifacts if database is not None else None)
    if found.lifecycle_stage == "deleted":
        raise UserError(f"the experiment {name!r} is deleted; restore it, or name another with tracking.experiment.")
    return str(found.experiment_id)


def _create_experiment(client: Any, name: str, artifacts: Optional[str]) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return client.get_experiment_by_name(name)  # another process was faster


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_TAG]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
