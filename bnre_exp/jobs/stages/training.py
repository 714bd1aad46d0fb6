"""Training as a stage does it: seeded, logged by epoch, and taken up again where it was interrupted."""

from __future__ import annotations

from typing import Any

from bnre_exp.algorithms.epoch import Epoch
from bnre_exp.algorithms.train import train
from bnre_exp.config import QatConfig, TrainConfig
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.outcome import Outcome
from bnre_exp.jobs.stages.setting import Setting, seed


def train_stage(
    setting: Setting, stage: str, given: Given, epochs: int, how: TrainConfig | QatConfig, outcome: Outcome,
    **more: Any,
) -> float:  # fmt: skip
    """Train the network that is given, in place, with the seed of the stage; adds the epochs to the outcome. more:
    arguments of the training that only some stages have. Returns the seconds of training."""

    def on_epoch(epoch: Epoch) -> None:
        values = {f"{stage}/train_loss": epoch.loss, f"{stage}/lr": epoch.lr, f"{stage}/epoch_seconds": epoch.seconds}
        values.update({f"{stage}/val_{name}": value for name, value in (epoch.validation or {}).items()})
        values.update({f"{stage}/{name}": value for name, value in (epoch.shares or {}).items()})
        outcome.curves.append((epoch.epoch, values))
        setting.on_metrics(values, epoch.epoch)
        headline = setting.task.headline
        score = (
            "" if epoch.validation is None else f", validation {headline.label} {epoch.validation[headline.name]:.4f}"
        )
        setting.say(f"  {stage} epoch {epoch.epoch}/{epochs}: loss {epoch.loss:.4f}{score}, {epoch.seconds:.1f} s")

    seed(setting.config, stage)
    history = train(
        given.network, setting.loaders.fresh("train"), epochs, lr=how.lr, optimizer=how.optimizer.value,
        momentum=how.momentum, weight_decay=how.weight_decay, schedule=how.schedule.value,
        label_smoothing=how.label_smoothing, **setting.speed, task=setting.task,
        validation=setting.loaders.validation, on_epoch=on_epoch, snapshots=given.snapshots, progress=setting.progress,
        description=f"{stage}: epoch", **more,
    )  # fmt: skip
    return sum(epoch.seconds for epoch in history)
