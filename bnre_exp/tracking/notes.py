"""Which MLflow run a folder has, and how much of its journal is there: noted in the folder, found or made in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from bnre_exp.errors import UserError
from bnre_exp.files import replacing
from bnre_exp.tracking import stores
from bnre_exp.tracking.journal import read_records
from bnre_exp.tracking.stores import code_of, experiment_of
from bnre_exp.tracking.typed_text import shortened

LONGEST_NAME = 250  # characters that MLflow takes
DELIVERED, UID = "mlflow.json", "bnre.uid"


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


def ensure_run(client: Any, folder: Path, about: Mapping[str, Any], note: dict[str, Any], uri: str) -> None:
    """The MLflow run of a folder, and of the folder that it is nested in: found by its tag, or created."""
    if uri != about["uri"]:
        note["uri"] = uri  # the run lives there from now on
    if "run_id" in note:
        return
    tags = {**about["tags"], UID: about["uid"]}
    if about.get("parent"):
        tags["mlflow.parentRunId"] = _parent_run(client, folder / about["parent"], uri)
    experiment = experiment_of(client, about["experiment"], uri, about["artifacts"])
    # It may be there: an answer can be lost, and so can the note.
    found = client.search_runs([experiment], f"tags.`{UID}` = '{about['uid']}'", max_results=1)
    run = (
        found[0] if found else client.create_run(experiment, run_name=shortened(about["name"], LONGEST_NAME), tags=tags)
    )
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


def _parent_run(client: Any, folder: Path, uri: str) -> str:
    with FileLock(folder / "mlflow.lock", timeout=stores.PATIENCE):
        note = read_note(folder)
        forget_if_gone(client, note)
        ensure_run(client, folder, read_records(folder)[0]["run"], note, uri)
    return str(note["run_id"])
