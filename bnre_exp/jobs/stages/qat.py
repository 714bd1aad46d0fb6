"""Quantization-aware training of the simulation."""

from __future__ import annotations

from typing import Any

from torch import nn

from bnre_exp.errors import counted
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.jobs.stages.training import train_stage


def qat_settings(setting: Setting, own: dict[str, Any]) -> dict[str, Any]:
    """What is done before the first step is a stage of its own."""
    return {name: value for name, value in own.items() if name != "qat.prepare"}


def qat(setting: Setting, given: Given) -> tuple[Outcome, nn.Module]:
    """Train the simulation in place, and evaluate it."""
    outcome, how, sim = Outcome(), setting.config.qat, given.network
    seconds = train_stage(setting, "qat", given, how.epochs, how, outcome)
    evaluation = setting.evaluate(sim, "qat: evaluate")
    note = f"trained for {counted(how.epochs, 'epoch')}"
    outcome.measured.append(Measured("qat", "QAT", evaluation, seconds, after=given.before, note=note))
    return outcome, sim
