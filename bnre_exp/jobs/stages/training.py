"""Training as a stage does it: seeded, logged by epoch, and taken up again where it was interrupted."""

from __future__ import annotations

from torch import nn

from bnre_exp.algorithms.train import Epoch, train
from bnre_exp.config import QatConfig, TrainConfig
from bnre_exp.jobs.stages.outcome import Outcome
from bnre_exp.jobs.stages.setting import Setting, seed
from bnre_exp.jobs.stages.snapshots import SnapshotFolder


def train_stage(
    setting: Setting,
    stage: str,
    model: nn.Module,
    epochs: int,
    how: TrainConfig | QatConfig,
    snapshots: SnapshotFolder | None,
    outcome: Outcome,
) -> float:
    """Train in place, with the seed of the stage; adds the epochs to the outcome. Returns the seconds of training."""

    def on_epoch(epoch: Epoch) -> None:
        values = {f"{stage}/train_loss": epoch.loss, f"{stage}/lr": epoch.lr, f"{stage}/epoch_seconds": epoch.seconds}
        if epoch.val_top1 is not None and epoch.val_loss is not None:
            values.update({f"{stage}/val_top1": epoch.val_top1, f"{stage}/val_loss": epoch.val_loss})
        outcome.curves.append((epoch.epoch, values))
        setting.on_metrics(values, epoch.epoch)
        score = "" if epoch.val_top1 is None else f", validation top-1 {epoch.val_top1:.4f}"
        setting.say(f"  {stage} epoch {epoch.epoch}/{epochs}: loss {epoch.loss:.4f}{score}, {epoch.seconds:.1f} s")

    seed(setting.config, stage)
    history = train(
        model, setting.loaders.fresh("train"), epochs, lr=how.lr, optimizer=how.optimizer.value, momentum=how.momentum,
        weight_decay=how.weight_decay, schedule=how.schedule.value, label_smoothing=how.label_smoothing,
        precision=setting.config.runtime.precision.value, validation=setting.loaders.validation, on_epoch=on_epoch,
        snapshots=snapshots, progress=setting.progress, description=f"{stage}: epoch",
    )  # fmt: skip
    return sum(epoch.seconds for epoch in history)
