"""The FP32 network: trained here, or as it was loaded."""

from __future__ import annotations

from torch import nn

from bnre_exp.algorithms.evaluate import evaluate
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.setting import Setting, seed
from bnre_exp.jobs.stages.snapshots import SnapshotFolder
from bnre_exp.jobs.stages.training import train_stage


def epochs_of(setting: Setting) -> int:
    """Epochs of FP32 training: ``train.epochs``, else the dataset's, or none where weights were loaded."""
    epochs = setting.config.train.epochs
    if epochs is None:
        return 0 if setting.built.pretrained else setting.config.dataset.train_epochs
    return epochs


def fp32(setting: Setting, network: nn.Module, snapshots: SnapshotFolder | None) -> tuple[Outcome, nn.Module]:
    """Train the network in place, if it is to be trained, and evaluate it."""
    outcome, epochs, seconds, note = Outcome(), epochs_of(setting), 0.0, "loaded"
    seed(setting.config, "fp32")
    if epochs:
        seconds = train_stage(setting, "fp32", network, epochs, setting.config.train, snapshots, outcome)
        note = f"trained for {epochs} epochs"
    elif not setting.built.pretrained:
        note = "random weights: train.epochs=0 and nothing loaded"
    evaluation = evaluate(network, setting.loaders.test, progress=setting.progress, description="fp32: evaluate")
    outcome.measured.append(Measured("fp32", "FP32", evaluation, seconds, note=note))
    return outcome, network
