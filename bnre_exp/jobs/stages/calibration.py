"""Calibration as stages do it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from bnre_exp.algorithms.calibrate import calibrate
from bnre_exp.jobs.stages.setting import Setting


def calibrate_stage(setting: Setting, sim: nn.Module, stage: str) -> None:
    """Fit activation ranges to the calibration batches, in place."""

    def progress(iterable: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
        return setting.progress(iterable, f"{stage}: {description}", total)

    batches, count = setting.loaders.fresh("calibration"), setting.config.quant.calib_batches
    calibrate(sim, batches, count, setting.task.feed, progress=progress)
