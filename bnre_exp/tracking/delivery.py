"""From a journal to MLflow, in order, and what has arrived there."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bnre_exp.errors import UserError
from bnre_exp.files import replacing
from bnre_exp.tracking import stores
from bnre_exp.tracking.journal import Journal, read_records
from bnre_exp.tracking.send import send
from bnre_exp.tracking.stores import check_reachable, client_of, code_of, experiment_of, first_line, is_busy, turn

LONGEST_TAG = 5000  # characters that MLflow takes
PAUSE = 30.0  # seconds before a store that did not answer is tried again
DELIVERED, UID = "mlflow.json", "bnre.uid"
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")  # what no later attempt would change

logger = logging.getLogger(__name__)


class Delivery:
    """Brings the records of a journal to MLflow, in order. What it has brought there is noted in ``mlflow.json``.

    problem: why the last attempt ended early, None if it did not.
    """

    def __init__(self, journal: Journal) -> None:
        self.folder, self._journal = journal.folder, journal
        self.about: Mapping[str, Any] = journal.records[0]["run"]
        self.uri: str = self.about["uri"]
        self._note = read_note(self.folder)
        self._client: Any = None
        self._is_open = self._is_checked = False
        self._next_try = 0.0
        self.problem: str | None = None

    @property
    def run_id(self) -> str | None:
        return self._note.get("run_id")

    @property
    def experiment_id(self) -> str | None:
        return self._note.get("experiment_id")

    @property
    def pending(self) -> int:
        """Records that MLflow does not have yet."""
        return missing(self._journal.records, self._note)

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
            lock.acquire(timeout=stores.PATIENCE)
        except Timeout:  # another process delivers this folder's records
            return
        try:
            self._note = read_note(self.folder)
            self._deliver()
            self.problem = None
        except Exception as error:
            already, self.problem = self.problem, first_line(error)
            if is_first and (isinstance(error, UserError) or not (self.uri.startswith("http") or is_busy(error))):
                raise UserError(
                    f"MLflow cannot be opened at {self.uri}: {first_line(error)}\nCorrect tracking.uri, or run "
                    "without MLflow: tracking.enabled=false (metrics then are in metrics.jsonl only)."
                ) from error
            self._next_try = time.monotonic() + PAUSE
            if already is None:
                logger.warning(
                    "MLflow at %s does not take records (%s). The run goes on; what is missing there is in %s, and is "
                    "delivered when MLflow answers, or by bnre-exp-sync.",
                    self.uri, first_line(error), self._journal.folder / "metrics.jsonl",
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
            self._client = client_of(self.uri)
        return self._client

    def _deliver(self) -> None:
        check_reachable(self.uri, is_open=self._client is not None)
        with turn(self.uri):
            client = self._connect()
            if not self._is_checked:
                forget_if_gone(client, self._note)
            ensure_run(client, self.folder, self.about, self._note)
            self._is_checked = True
            for record in self._journal.records[int(self._note["count"]) :]:
                try:
                    send(client, self.folder, self._note, record)
                except Exception as error:
                    if code_of(error) == "RESOURCE_DOES_NOT_EXIST":  # the run is gone: everything goes there again
                        self._note = {}
                        write_note(self.folder, self._note)
                    if code_of(error) not in REFUSED:
                        raise
                    forget_if_gone(client, self._note)  # deleted in the UI: no record is refused for itself
                    logger.warning("MLflow refuses a record of %s: %s", self.folder, first_line(error))
                self._note["count"] += 1
                write_note(self.folder, self._note)


def goes_to_mlflow(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a journal with these records is that of a run with MLflow."""
    return bool(records) and "uri" in records[0].get("run", {})


def missing(records: Sequence[Mapping[str, Any]], note: Mapping[str, Any]) -> int:
    """How many of the records MLflow does not have yet."""
    return max(0, len(records) - int(note.get("count", 0)))


def read_note(folder: Path) -> dict[str, Any]:
    """Which MLflow run a folder has, and how many of its records are there."""
    try:
        note = json.loads((folder / DELIVERED).read_text())
        return note if isinstance(note, dict) else {}
    except (OSError, ValueError):
        return {}


def write_note(folder: Path, note: Mapping[str, Any]) -> None:
    """Replace the note of a folder, in one step."""
    with replacing(folder / DELIVERED) as new:
        new.write_text(json.dumps(note))


def ensure_run(client: Any, folder: Path, about: Mapping[str, Any], note: dict[str, Any]) -> None:
    """The MLflow run of a folder, and of the folder that it is nested in: found by its tag, or created."""
    if "run_id" in note:
        return
    tags = {**about["tags"], UID: about["uid"]}
    if about.get("parent"):
        tags["mlflow.parentRunId"] = _parent_run(client, folder / about["parent"])
    experiment = experiment_of(client, about["experiment"], about["uri"], about["artifacts"])
    # It may be there: an answer can be lost, and so can the note.
    found = client.search_runs([experiment], f"tags.`{UID}` = '{about['uid']}'", max_results=1)
    run = found[0] if found else client.create_run(experiment, run_name=about["name"], tags=tags)
    note.update({"experiment_id": experiment, "run_id": run.info.run_id, "count": 0})
    write_note(folder, note)


def forget_if_gone(client: Any, note: dict[str, Any]) -> None:
    """Forget a run that MLflow does not know, whose store is another one now: everything goes there again. Raises
    ``UserError`` for one that was deleted, as in the UI."""
    from mlflow.exceptions import MlflowException

    if "run_id" not in note:
        return
    try:
        run = client.get_run(note["run_id"])
    except MlflowException as error:
        if code_of(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        note.clear()
        return
    if run.info.lifecycle_stage != "active":
        raise UserError(f"the run {note['run_id']} was deleted in MLflow; restore it there to have the rest of it.")


def _parent_run(client: Any, folder: Path) -> str:
    with FileLock(folder / "mlflow.lock", timeout=stores.PATIENCE):
        note = read_note(folder)
        forget_if_gone(client, note)
        ensure_run(client, folder, read_records(folder)[0]["run"], note)
    return str(note["run_id"])
