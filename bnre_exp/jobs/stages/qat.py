"""Quantization-aware training of the simulation."""

from __future__ import annotations

from torch import nn

from bnre_exp.algorithms.bn_statistics import has_running_statistics
from bnre_exp.algorithms.reestimate import reestimate_bn_stats
from bnre_exp.errors import counted
from bnre_exp.jobs.stages.calibration import calibrate_stage
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.setting import Setting, seed
from bnre_exp.jobs.stages.training import train_stage
from bnre_exp.quantsim.sim import activation_quantizers, bypassed


def qat(setting: Setting, given: Given) -> tuple[Outcome, nn.Module]:
    """Train the simulation in place, and evaluate it."""
    outcome, how, sim = Outcome(), setting.config.qat, given.network
    seed(setting.config, "qat start")
    # Training normalizes each batch by itself; ranges found under statistics that no longer fit would start it with
    # dead activations (MobileNetV2's gradients overflowed that way at 2 bits).
    if activation_quantizers(sim) and has_running_statistics(sim):
        with bypassed(sim):
            batches = setting.loaders.fresh("calibration")
            reestimate_bn_stats(sim, batches, setting.config.quant.calib_batches, setting.task.feed, **setting.speed)
        calibrate_stage(setting, sim, "qat")
    seconds = train_stage(setting, "qat", given, how.epochs, how, outcome)
    evaluation = setting.evaluate(sim, "qat: evaluate")
    note = f"trained for {counted(how.epochs, 'epoch')}"
    outcome.measured.append(Measured("qat", "QAT", evaluation, seconds, after=given.before, note=note))
    return outcome, sim
