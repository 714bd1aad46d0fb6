"""BN re-estimation, and what activation ranges need around it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from bnre_exp.algorithms.reestimate import reestimate_bn_stats
from bnre_exp.config import ActQuant, Recalibrate, ReestMethod
from bnre_exp.errors import counted
from bnre_exp.jobs.stages.calibration import calibrate_stage
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.setting import Setting, seed, timed
from bnre_exp.quantsim.sim import activation_quantizers, bypassed


def reest_settings(setting: Setting, own: dict[str, Any]) -> dict[str, Any]:
    """The momentum is that of a method which may not be used."""
    is_used = setting.config.reest.method is ReestMethod.ema
    return {name: value for name, value in own.items() if is_used or name != "reest.momentum"}


def reest(setting: Setting, given: Given) -> tuple[Outcome, nn.Module]:
    """Re-estimate the statistics of the simulation in place, calibrate again where that is asked for, and evaluate."""
    outcome, how, has_qat = Outcome(), setting.config.reest, setting.config.qat.epochs > 0
    sim, before = given.network, given.before
    seed(setting.config, "reest")
    bypass = how.act_quant is ActQuant.bypassed or (how.act_quant is ActQuant.auto and not has_qat)
    again = how.recalibrate is Recalibrate.always or (how.recalibrate is Recalibrate.auto and not has_qat)
    again = again and bool(activation_quantizers(sim))
    value_before = setting.evaluations[before].value
    if again:
        alone = _recalibrated_only(setting, sim, before)
        outcome.measured.append(alone)
        before, value_before = alone.stage, alone.evaluation.value

    def work() -> Any:
        with bypassed(sim, activations=bypass):
            return reestimate_bn_stats(
                sim, setting.loaders.fresh("reestimation"), how.num_batches, setting.task.feed,
                method=how.method.value, momentum=how.momentum, **setting.speed, progress=setting.progress,
            )  # fmt: skip

    handle, seconds = timed(work)
    if again:
        _, outcome.metrics["recalibrate/seconds"] = timed(lambda: calibrate_stage(setting, sim, "recalibrate"))
    note = f"{counted(handle.num_batches, 'batch')}, {counted(handle.passes, 'pass')}" + (
        ", then recalibrated" if again else ""
    )
    evaluation = setting.evaluate(sim, "reest: evaluate")
    delta = evaluation.value - value_before
    metrics = {"passes": float(handle.passes), f"delta_{setting.task.headline.name}": delta}
    outcome.measured.append(Measured("reest", "re-estimate BN", evaluation, seconds, before, note, metrics))
    outcome.except_for("not re-estimated", [(name, "has no running statistics") for name in handle.without_statistics])
    outcome.except_for("not re-estimated", [(name, "FrozenBatchNorm2d: constants") for name in handle.frozen])
    outcome.except_for("not re-estimated", [(name, "calls F.batch_norm itself") for name in handle.functional])
    return outcome, sim


def _recalibrated_only(setting: Setting, sim: nn.Module, before: str) -> Measured:
    """What new ranges do on their own, so that the two effects are not mixed."""
    alone = copy.deepcopy(sim)
    _, seconds = timed(lambda: calibrate_stage(setting, alone, "recalibrate only"))
    evaluation = setting.evaluate(alone, "recal_only: evaluate")
    note = "for comparison, then discarded"
    return Measured("recal_only", "recalibrate only", evaluation, seconds, before, note)
