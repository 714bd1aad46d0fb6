"""From a journal to MLflow, in order, and what has arrived there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any

from filelock import FileLock, Timeout

from bnre_exp.credentials import take_credentials
from bnre_exp.errors import UserError
from bnre_exp.tracking import stores
from bnre_exp.tracking.journal import Journal
from bnre_exp.tracking.notes import ensure_run, forget_if_gone, missing, read_note, write_note
from bnre_exp.tracking.send import goes_together, send, send_together
from bnre_exp.tracking.stores import (
    check_reachable,
    client_of,
    code_of,
    database_of,
    first_line,
    import_client,
    is_busy,
    turn,
)

LONGEST_TAG = 5000  # characters that MLflow takes
PAUSE = 30.0  # seconds before a store that did not answer is tried again
SLOW = 1.0  # seconds; a local store that takes longer for a record is given many at once
FIRST_WAIT = 3.0  # seconds that a server's first answers are waited for, which may tell a mistake
LONGEST_WAIT = 10.0  # seconds that the end of a run waits for a server, in all
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")  # what no later attempt would change

logger = logging.getLogger(__name__)


class Delivery:
    """Brings the records of a journal to MLflow, in order. What it has brought there is noted in ``mlflow.json``.

    A server, or a database that is one, may be slow: a thread brings the records there, all that wait at once, and what
    is waited for it is bounded in all. A local SQLite store takes them in the calling thread.

    uri: another store than the journal's, from now on. problem: why the last attempt ended early, None if it did not.
    """

    def __init__(self, journal: Journal, uri: str | None = None) -> None:
        self.folder, self._journal = journal.folder, journal
        self.about: Mapping[str, Any] = journal.records[0]["run"]
        self._note = read_note(self.folder)
        self.uri: str = take_credentials(uri or self._note.get("uri") or self.about["uri"])
        self._is_apart = database_of(self.uri) is None
        self._client: Any = None
        self._is_open = self._is_checked = self._is_over = False
        self._is_opening = True
        self._next_try, self._waiting_left = 0.0, LONGEST_WAIT
        self._thread: Thread | None = None
        self._mistake: UserError | None = None
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

    def begin(self) -> None:
        """Have a server, which may be slow, begin before :meth:`open` waits for it; nothing for a local store."""
        if self._is_apart and not self._is_open:
            self._is_open = True
            import_client()  # in a thread, a process that is forked meanwhile would have half of it
            self._start(is_first=True)

    def open(self) -> None:
        """The first delivery. Raises ``UserError`` if the store is no server and does not work."""
        if not self._is_opening:
            return
        self.begin()
        self._is_open = True
        try:
            if not self._is_apart:
                self.flush(is_first=True)
                return
            self._wait(FIRST_WAIT)
            self._waiting_left = LONGEST_WAIT
        finally:
            self._is_opening = False
        if self._mistake is not None:
            raise self._mistake

    def notify(self) -> None:
        """Have a new record delivered, now or with others."""
        if not self._is_apart:
            self.flush()
        elif self._is_open and time.monotonic() >= self._next_try:
            self._start()

    def settle(self, *, is_last: bool = False) -> None:
        """Wait until MLflow has everything, or cannot be reached; for a server at most LONGEST_WAIT seconds in all.
        ``is_last``: try again whatever was, and say so if time is up."""
        if not self._is_apart:
            self.flush(again=is_last or (self._is_open and self.problem is None))
            return
        if is_last:
            import_client()
        while self.pending and self._waiting_left > 0 and (is_last or (self._is_open and self.problem is None)):
            again = is_last and not self._is_running()
            self._start(again=again)
            self._wait(self._waiting_left)
            if again and self.problem is not None:
                break
        if is_last:
            self._is_over = True
            if self.pending and self._is_running():
                logger.warning(
                    "MLflow at %s is slow: %d records of this run are not there yet. They are in %s, and bnre-exp-sync "
                    "delivers them.", self.uri, self.pending, self.folder / "metrics.jsonl",
                )  # fmt: skip

    def flush(self, *, again: bool = False, is_first: bool = False) -> None:
        """Deliver what is pending, in this thread; after a failure, not before a pause is over, unless ``again``."""
        if not self.pending or not (again or (self._is_open and time.monotonic() >= self._next_try)):
            return
        lock = FileLock(self.folder / "mlflow.lock")
        try:
            lock.acquire(timeout=stores.PATIENCE)
        except Timeout:  # another process delivers this folder's records
            return
        started = time.monotonic()
        try:
            self._note = read_note(self.folder)
            self._deliver()
            self.problem = None
            if time.monotonic() - started > SLOW and not (is_first or self._is_apart):
                self._next_try = time.monotonic() + PAUSE
        except Exception as error:
            self._failed(error, is_first)
        finally:
            lock.release()

    def end_at_once(self, status: str, error: str) -> None:
        """Set status and error of the run in MLflow, past the journal, which cannot be written."""
        with suppress(Exception):
            self._connect().set_tag(self.run_id, "error", error[:LONGEST_TAG])
            self._connect().set_terminated(self.run_id, status)

    def _failed(self, error: Exception, is_first: bool) -> None:
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

    def _start(self, **how: bool) -> None:
        """Deliver in a thread; one that is at it finds new records itself."""

        def work() -> None:
            try:
                self.flush(**how)
            except UserError as error:
                self._mistake = error
                if not self._is_opening:
                    logger.warning("%s", error)

        if not self._is_running():
            # A daemon: the process need not wait for an answer, since what is sent twice changes nothing
            self._thread = Thread(target=work, name="mlflow", daemon=True)
            self._thread.start()

    def _is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wait(self, seconds: float) -> None:
        started = time.monotonic()
        if self._thread is not None:
            self._thread.join(seconds)
        self._waiting_left -= time.monotonic() - started

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
            ensure_run(client, self.folder, self.about, self._note, self.uri)
            self._is_checked = True
            while self.pending and not self._is_over:
                self._bring(client, self._journal.records[int(self._note["count"]) :])

    def _bring(self, client: Any, records: Sequence[Mapping[str, Any]]) -> None:
        """Bring the first of the records there, up to a change of status: in few calls what goes together, the rest one
        by one."""
        status = next((place for place, record in enumerate(records) if "status" in record), len(records))
        records = records[: max(status, 1)]
        before = int(self._note["count"])
        together = [record for record in records if goes_together(record)]
        are_there = len(together) > 1 and self._is_taken(together, partial(send_together, client, self._note, together))
        for place, record in enumerate(records, before + 1):
            if self._is_over:
                return
            if not (are_there and goes_together(record)):
                self._is_taken([record], partial(send, client, self.folder, self._note, record))
            self._note["count"] = place
            write_note(self.folder, self._note)

    def _is_taken(self, records: Sequence[Mapping[str, Any]], send_them: Callable[[], None]) -> bool:
        """Send records; False if MLflow refuses them, which is told of a single one."""
        try:
            send_them()
            return True
        except Exception as error:
            if code_of(error) == "RESOURCE_DOES_NOT_EXIST":  # the run is gone: everything goes there again
                self._note = {}
                write_note(self.folder, self._note)
            if code_of(error) not in REFUSED:
                raise
            forget_if_gone(self._client, self._note)  # deleted in the UI: no record is refused for itself
            if len(records) == 1:
                logger.warning("MLflow refuses a record of %s: %s", self.folder, first_line(error))
            return False
