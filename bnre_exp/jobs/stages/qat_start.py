"""What is done to the simulation before the first step of QAT: a stage of its own, so that QAT's gain is QAT's."""

from __future__ import annotations

from typing import Any

from torch import nn

from bnre_exp.algorithms.bn_statistics import has_running_statistics
from bnre_exp.algorithms.reestimate import reestimate_bn_stats
from bnre_exp.config import Config, QatPrepare
from bnre_exp.errors import counted
from bnre_exp.jobs.stages.calibration import calibrate_stage
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.setting import Setting, seed, timed
from bnre_exp.quantsim.sim import activation_quantizers, bypassed


def prepare_of(config: Config) -> QatPrepare:
    """What is done before the first step of QAT: a job without re-estimation has none there either, unless asked."""
    if config.qat.prepare is not QatPrepare.auto:
        return config.qat.prepare
    return QatPrepare.reestimate if config.reest.num_batches else QatPrepare.calibrate


def qat_start_settings(setting: Setting, own: dict[str, Any]) -> dict[str, Any]:
    """Of QAT's settings this one alone; how many batches is a setting of calibration, before it."""
    return {"qat.prepare": prepare_of(setting.config).value}


def qat_start(setting: Setting, given: Given) -> tuple[Outcome, nn.Module]:
    """Fit statistics and ranges of the simulation to what QAT starts from, in place, and evaluate it.

    Training normalizes each batch by itself; ranges found under statistics that no longer fit would start it with dead
    activations (MobileNetV2's gradients overflowed that way at 2 bits).
    """
    outcome, sim, count = Outcome(), given.network, setting.config.quant.calib_batches
    seed(setting.config, "qat start")
    has_statistics = prepare_of(setting.config) is QatPrepare.reestimate and has_running_statistics(sim)
    done = [f"re-estimated from {counted(count, 'batch', 'batches')}"] if has_statistics else []
    done += ["ranges calibrated"] if activation_quantizers(sim) else []

    def work() -> None:
        if has_statistics:
            with bypassed(sim):
                batches = setting.loaders.fresh("calibration")
                reestimate_bn_stats(sim, batches, count, setting.task.feed, **setting.speed)
        calibrate_stage(setting, sim, "qat")

    _, seconds = timed(work)
    evaluation = setting.evaluate(sim, "qat start: evaluate")
    note = ", ".join(done) or "nothing to prepare"
    outcome.measured.append(Measured("qat_start", "start of QAT", evaluation, seconds, after=given.before, note=note))
    return outcome, sim
