"""One run: its journal first, and MLflow from there."""

from __future__ import annotations

import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bnre_exp.credentials import redact, take_credentials
from bnre_exp.errors import UserError
from bnre_exp.tracking.delivery import LONGEST_TAG, Delivery
from bnre_exp.tracking.journal import Journal, json_numbers, read_records
from bnre_exp.tracking.links import user_name
from bnre_exp.tracking.notes import goes_to_mlflow, missing, read_note
from bnre_exp.tracking.packaging import package_onnx
from bnre_exp.tracking.stores import absolute_uri
from bnre_exp.tracking.typed_text import CUT, LONGEST_PARAM, as_params, shortened

REST = "\n\n… The rest is among the artifacts.\n"

logger = logging.getLogger(__name__)


class RunLog:
    """One run: everything goes to its journal first, and from there to MLflow.

    run_id, experiment_id: of MLflow, None without it or while it is out of reach. uri: of the store, None without it.
    """

    def __init__(self, journal: Journal, delivery: Delivery | None) -> None:
        self.run_dir, self._journal, self._delivery = journal.folder, journal, delivery
        self._told: set[str] = set()

    @property
    def uri(self) -> str | None:
        return self._delivery.uri if self._delivery else None

    @property
    def run_id(self) -> str | None:
        return self._delivery.run_id if self._delivery else None

    @property
    def experiment_id(self) -> str | None:
        return self._delivery.experiment_id if self._delivery else None

    @property
    def undelivered(self) -> int:
        """Records that MLflow does not have yet."""
        return self._delivery.pending if self._delivery else 0

    def begin(self) -> None:
        """Have a server, which may be slow, open MLflow meanwhile; nothing for a local store."""
        if self._delivery is not None:
            self._delivery.begin()

    def connect(self) -> None:
        """Open MLflow and bring there what the journal holds. Raises ``UserError`` if the store is no server and does
        not work, which is a mistake that should be told before any work; a server may come back."""
        if self._delivery is not None:
            self._delivery.open()

    def settle(self) -> None:
        """Wait until MLflow has what the journal holds, seconds at most for a server that is slow."""
        if self._delivery is not None:
            self._delivery.settle()

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics by name; ``step``: epoch of a curve. Raises ``OSError`` if the journal cannot be written."""
        numbers = json_numbers(values)
        self._add("metrics", numbers, step=step)
        infinite = {name for name, value in numbers.items() if isinstance(value, str)} - self._told
        if infinite:
            self._told |= infinite
            logger.info("Not finite, in MLflow as tags: %s", ", ".join(f"{k}={numbers[k]}" for k in sorted(infinite)))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._add("tags", {key: shortened(str(value), LONGEST_TAG) for key, value in values.items()})

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

    def model(
        self, folder: Path, name: str, kind: str, params: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """List a folder below the run's as a model of this run, with its metrics."""
        short = {key: shortened(value, 250) for key, value in as_params(params).items()}
        known = {"name": name, "kind": kind, "params": short, "metrics": json_numbers(metrics)}
        self._add("model", {"folder": str(folder.relative_to(self.run_dir)), **known})

    def onnx_model(
        self, path: Path, name: str, example: np.ndarray, params: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """List an ONNX file as a model that MLflow can load and serve, with signature and input example; ``example``:
        one input ``[1, ...]``. Without MLflow, nothing is done."""
        if self._delivery is not None:
            folder = self.run_dir / f"{path.stem}_mlflow"
            package_onnx(path, folder, example)
            self.model(folder, name, "onnx", params, metrics)

    def note(self, text: str) -> None:
        """Set what MLflow shows as the description of the run, in Markdown; one that is cut says so."""
        if len(text) > LONGEST_TAG:
            text = text[: LONGEST_TAG - len(REST)].rpartition("\n")[0] + REST
        self.tags({"mlflow.note.content": text})

    def view(
        self, params: Sequence[str], ends: Sequence[str], metrics: Sequence[str], is_ascending: bool = False
    ) -> str | None:
        """Save a view of the runs nested in this one: ``params`` against ``ends``, metrics that all runs have, and a
        chart of each of ``metrics``. Returns its key for a link, None if MLflow is out of reach."""
        drawn = {"params": list(params), "ends": list(ends), "metrics": list(metrics), "is_ascending": is_ascending}
        self._add("view", drawn)
        return None if self.run_id is None else self.run_id[:12]

    def _add(self, kind: str, value: Any, **more: Any) -> None:
        if self._journal.add(kind, value, **more) and self._delivery is not None:
            self._delivery.notify()

    def _end(self, status: str, error: BaseException | None) -> None:
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
            self._delivery.settle(is_last=True)


@contextmanager
def open_run(
    run_dir: Path,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    output_dir: Path,
    experiment: str,
    run_name: str,
    uri: str | None = None,
    enabled: bool = True,
    parent: Path | None = None,
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
            store = absolute_uri(take_credentials(uri) if uri else f"sqlite:///{output_dir / 'mlflow.db'}")
            output_dir.mkdir(parents=True, exist_ok=True)
            artifacts = (output_dir.absolute() / "mlartifacts").as_uri()
            about.update({"uri": store, "experiment": experiment, "artifacts": artifacts})
            about["parent"] = os.path.relpath(parent, run_dir) if parent is not None else None
        is_new = not journal.records
        journal.add("run", about) if is_new else journal.add("status", "RUNNING", error=None)
        if enabled and goes_to_mlflow(journal.records):
            delivery = Delivery(journal)
        log = RunLog(journal, delivery)
        if connect:
            log.connect()
        try:
            log._add("params", _told(as_params(params)))
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
        if goes_to_mlflow(journal.records):
            Delivery(journal).settle(is_last=True)


def sync(run_dir: Path, uri: str | None = None, *, is_bounded: bool = False) -> tuple[int, int]:
    """Deliver what MLflow does not have of a run; returns how many records went there, and how many are left.

    uri: another store than the run's, which is the run's from now on; None: its own. is_bounded: a slow server is given
    up after seconds. Raises ``UserError`` with the reason if the first of those left could not be delivered.
    """
    with Journal(run_dir) as journal:
        if not goes_to_mlflow(journal.records):
            return 0, 0
        delivery = Delivery(journal, absolute_uri(uri) if uri else None)
        before = delivery.pending
        if is_bounded:
            delivery.settle(is_last=True)
        else:
            delivery.problem = ""  # no news: it is raised here, and no run goes on
            delivery.flush(again=True)
        if delivery.pending and delivery.problem:
            raise UserError(delivery.problem)
        return before - delivery.pending, delivery.pending


def undelivered(run_dir: Path) -> int:
    """Records of a run that MLflow does not have yet; 0 for a run without MLflow."""
    records = read_records(run_dir)
    return missing(records, read_note(run_dir)) if goes_to_mlflow(records) else 0


def _all_tags(run_dir: Path, tags: Mapping[str, str]) -> dict[str, str]:
    own = {
        "host": socket.gethostname(), "run_dir": str(run_dir), "mlflow.user": user_name(),
        "mlflow.source.name": "python -m bnre_exp", "mlflow.source.type": "LOCAL",
    }  # fmt: skip
    return {key: shortened(str(value), LONGEST_TAG) for key, value in {**own, **tags}.items() if value}


def _describe(error: BaseException) -> str:
    return shortened(redact(f"{type(error).__name__}: {error}"), LONGEST_TAG)


def _told(params: dict[str, str]) -> dict[str, str]:
    """The params, after a word about those that are cut."""
    cut = [name for name, text in params.items() if text.endswith(CUT)]
    if cut:
        logger.warning("%s: MLflow takes %d characters; config.yaml has the whole.", ", ".join(cut), LONGEST_PARAM)
    return params
