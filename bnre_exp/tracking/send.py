"""Each kind of record as MLflow takes it; sent a second time, it changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bnre_exp.tracking.charts import charts
from bnre_exp.tracking.typed_text import metric_key, model_name

NOT_FINITE = "not_finite"  # before the metric's name, the tag that holds what is no number


def goes_together(record: Mapping[str, Any]) -> bool:
    """Whether a record is sent in few calls with others of its like."""
    return any(kind in record for kind in ("run", "params", "metrics", "tags", "dataset"))


def send_together(client: Any, note: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Bring records to MLflow that go together, in order; a second time, that changes nothing."""
    from mlflow.entities import Param, RunTag

    metrics: list[Any] = []
    params: dict[tuple[str, str], None] = {}  # one given two values is MLflow's to refuse
    tags: dict[str, str] = {}
    for record in records:
        params.update(dict.fromkeys(record.get("params", {}).items()))
        if "metrics" in record:
            numbers, others = _measured(record["metrics"], int(record["step"]))
            metrics += _metrics(numbers, record)
            tags.update(others)
        tags.update(record.get("tags", {}))
    client.log_batch(
        note["run_id"], metrics, [Param(*item) for item in params], [RunTag(*item) for item in tags.items()]
    )
    datasets = [_dataset(record["dataset"]) for record in records if "dataset" in record]
    if datasets:
        client.log_inputs(note["run_id"], datasets)


def send(client: Any, folder: Path, note: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Bring one record to MLflow; a second time, that changes nothing."""
    run, stamp = note["run_id"], int(record["time"] * 1000)
    if goes_together(record):
        send_together(client, note, [record])
    elif "artifact" in record and (folder / record["artifact"]).exists():
        client.log_artifact(run, str(folder / record["artifact"]), record.get("folder") or None)
    elif "table" in record and (folder / record["table"]).exists():
        client.log_artifact(run, str(folder / record["table"]))
        client.set_tag(run, "mlflow.loggedArtifacts", json.dumps([{"path": record["table"], "type": "table"}]))
    elif "model" in record and (folder / record["model"]["folder"]).exists():
        _send_model(client, folder, note, record)
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


def _measured(metrics: Mapping[str, Any], step: int) -> tuple[dict[str, float], dict[str, str]]:
    """The numbers as MLflow takes them, by its names, and tags for those that are not finite: MLflow would show
    1.8e308 for infinity."""
    values = {metric_key(name): float(value) for name, value in metrics.items()}
    numbers = {name: value for name, value in values.items() if math.isfinite(value)}
    return numbers, {f"{NOT_FINITE}.{k}": f"{v} (step {step})" for k, v in values.items() if k not in numbers}


def _metrics(numbers: Mapping[str, float], record: Mapping[str, Any], **of: str) -> list[Any]:
    from mlflow.entities import Metric

    stamp, step = int(record["time"] * 1000), int(record.get("step", 0))
    return [Metric(name, value, stamp, step, **of) for name, value in numbers.items()]


def _dataset(known: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = Dataset(
        name=known["name"], digest=known["digest"], source_type="code", source=json.dumps({"source": known["source"]}),
        profile=json.dumps(known["profile"]),
    )  # fmt: skip
    return DatasetInput(data, [InputTag("mlflow.data.context", known["role"])])


def _send_model(client: Any, folder: Path, note: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    run, experiment, known = note["run_id"], note["experiment_id"], record["model"]
    name, mine = model_name(known["name"]), f"source_run_id = '{run}'"
    found = [model for model in client.search_logged_models([experiment], filter_string=mine) if model.name == name]
    if found:
        model = found[0]
    else:
        model = client.create_logged_model(experiment, name, run, model_type=known["kind"], params=known["params"])
    if str(model.status) != str(LoggedModelStatus.READY):
        client.log_model_artifacts(model.model_id, str(folder / known["folder"]))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    numbers, _ = _measured(known["metrics"], 0)
    client.log_batch(run, metrics=_metrics(numbers, record, model_id=model.model_id, run_id=run))
    outputs = client.get_run(run).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])
