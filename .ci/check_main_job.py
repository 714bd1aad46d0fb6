"""Check what the main job on digits left in MLflow: check_main_job.py OUTPUT_DIR. Exit status 1 if anything is off."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Run  # noqa: E402

REQUIRED = [
    *(f"{stage}/top1" for stage in ("fp32", "ptq", "qat", "reest", "fold", "export", "onnx")),
    "onnx/top1_agreement",
    "onnx/milliseconds",
    "reest/delta_top1",
    "reest/seconds",
    "fold/max_abs_logit_diff",
    "fold/top1_agreement",
    "fold/bias_delta_top1",
]


def problems(client: MlflowClient, run: Run) -> list[str]:
    """What is wrong with a run, a line each."""
    metrics = run.data.metrics
    missing = [f"metric {name} is missing" for name in REQUIRED if name not in metrics]
    if missing:
        return missing
    found = []
    if run.info.status != "FINISHED":
        found.append(f"status is {run.info.status}, not FINISHED")
    if not metrics["fp32/top1"] > 0.95:
        found.append(f"fp32/top1 is {metrics['fp32/top1']:.4f}, not above 0.95")
    if not abs(metrics["fold/top1"] - metrics["reest/top1"]) <= 0.02:
        found.append(f"fold/top1 {metrics['fold/top1']:.4f} is not within 0.02 of reest's {metrics['reest/top1']:.4f}")
    if not metrics["fold/top1_agreement"] > 0.99:
        found.append(f"fold/top1_agreement is {metrics['fold/top1_agreement']:.4f}, not above 0.99")
    if not metrics["onnx/top1_agreement"] >= 0.99:
        found.append(f"onnx/top1_agreement is {metrics['onnx/top1_agreement']:.4f}, below 0.99")
    models = client.search_logged_models(experiment_ids=[run.info.experiment_id])
    if sum(model.source_run_id == run.info.run_id for model in models) != 2:
        found.append("not two logged models: the checkpoint and the ONNX model")
    return found


def main() -> int:
    stores = sorted(Path(sys.argv[1]).resolve().rglob("*.db"))
    if len(stores) != 1:
        sys.stderr.write(f"expected one SQLite store in {sys.argv[1]}, found {len(stores)}\n")
        return 1
    client = MlflowClient(tracking_uri=f"sqlite:///{stores[0]}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    found = [f"expected one run, found {len(runs)}"] if len(runs) != 1 else problems(client, runs[0])
    for line in found:
        sys.stderr.write(f"main job: {line}\n")
    if not found:
        sys.stdout.write("The main job on digits is recorded in MLflow as it should be.\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
