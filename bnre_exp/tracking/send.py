"""Each kind of record as MLflow takes it; sent a second time, it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bnre_exp.tracking.charts import charts
from bnre_exp.tracking.typed_text import metric_key, model_name


def send(client: Any, folder: Path, note: Mapping[str, Any], record: Mapping[str, Any]) -> None:
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
    name, mine = model_name(known["name"]), f"source_run_id = '{run}'"
    found = [model for model in client.search_logged_models([experiment], filter_string=mine) if model.name == name]
    if found:
        model = found[0]
    else:
        model = client.create_logged_model(experiment, name, run, model_type=known["kind"], params=known["params"])
    if str(model.status) != str(LoggedModelStatus.READY):
        client.log_model_artifacts(model.model_id, str(folder / known["folder"]))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    batch = [
        Metric(metric_key(k), float(v), stamp, 0, model_id=model.model_id, run_id=run)
        for k, v in known["metrics"].items()
    ]
    client.log_batch(run, metrics=batch)
    outputs = client.get_run(run).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])
