"""The FP32 network: trained here, or as it was loaded."""

from __future__ import annotations

import shutil
from typing import Any

from torch import nn

from bnre_exp.errors import UserError, counted
from bnre_exp.jobs.reporting import Job
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.network import STATE, Result, save_weights
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.setting import Setting, seed
from bnre_exp.jobs.stages.training import train_stage


def epochs_of(setting: Setting) -> int:
    """Epochs of FP32 training: ``train.epochs``, else the dataset's, or none where weights were loaded."""
    epochs = setting.config.train.epochs
    if epochs is None:
        return 0 if setting.built.pretrained else setting.config.dataset.train_epochs
    return epochs


def fp32_settings(setting: Setting, own: dict[str, Any]) -> dict[str, Any]:
    """``train.epochs=null`` is the dataset's number, and without training nothing else counts."""
    epochs = epochs_of(setting)
    return {**own, "train.epochs": epochs} if epochs else {"train.epochs": 0}


def fp32(setting: Setting, given: Given) -> tuple[Outcome, nn.Module]:
    """Train the network in place, if it is to be trained, and evaluate it."""
    outcome, epochs, seconds, note = Outcome(), epochs_of(setting), 0.0, "loaded"
    seed(setting.config, "fp32")
    if epochs:
        seconds = train_stage(setting, "fp32", given, epochs, setting.config.train, outcome)
        note = f"trained for {counted(epochs, 'epoch')}"
    elif not setting.built.pretrained:
        note = "random weights: train.epochs=0 and nothing loaded"
    evaluation = setting.evaluate(given.network, "fp32: evaluate")
    outcome.measured.append(Measured("fp32", "FP32", evaluation, seconds, note=note))
    return outcome, given.network


def leave_fp32(job: Job, result: Result) -> None:
    """Leave the weights in the run's folder. Raises ``UserError`` if the network is not as good as is asked for."""
    path = job.run_dir / "fp32.safetensors"
    if result.folder is not None:
        shutil.copyfile(result.folder / STATE, path)
    else:
        save_weights(path, result.take())
    job.results.summary.places["FP32 weights"] = str(path)
    evaluation, least = job.setting.evaluations["fp32"], job.config.fp32.min_headline
    if least is not None and evaluation.headline.is_worse(evaluation.value, least):
        raise UserError(
            f"fp32/{evaluation.headline.name}={evaluation.value:.4f} is worse than fp32.min_headline={least}: this is "
            "not the network that was expected. Check model.weights or model.checkpoint, the preprocessing and the "
            "class order, or train longer."
        )
