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
    seed(setting.config, "reest")
    outcome = re_estimated(setting, given, given.network, setting.config.qat.epochs > 0, "reest", "re-estimate BN")
    return outcome, given.network


def re_estimated(setting: Setting, given: Given, sim: nn.Module, has_qat: bool, stage: str, label: str) -> Outcome:
    """Re-estimate a simulation in place as after QAT, or as without: what that brings, as a row of the table."""
    outcome, how, before = Outcome(), setting.config.reest, given.before
    bypass = how.act_quant is ActQuant.bypassed or (how.act_quant is ActQuant.auto and not has_qat)
    again = how.recalibrate is Recalibrate.always or (how.recalibrate is Recalibrate.auto and not has_qat)
    again = again and bool(activation_quantizers(sim))
    if again:
        outcome.measured.append(_recalibrated_only(setting, sim, before))
        before = outcome.measured[-1].stage

    def work() -> Any:
        with bypassed(sim, activations=bypass):
            return reestimate_bn_stats(
                sim, setting.loaders.fresh("reestimation"), how.num_batches, setting.task.feed,
                method=how.method.value, momentum=how.momentum, **setting.speed, progress=setting.progress,
            )  # fmt: skip

    handle, seconds = timed(work)
    notes = [counted(handle.num_batches, "batch", "batches"), counted(handle.loader_passes, "pass", "passes")]
    if again:
        _, outcome.metrics[f"{stage}/recalibrate_seconds"] = timed(lambda: calibrate_stage(setting, sim, "recalibrate"))
        notes.append("then recalibrated")
    notes += ["for comparison"] if stage == "reest_only" else []
    evaluation = setting.evaluate(sim, f"{stage}: evaluate")
    metrics = {"loader_passes": float(handle.loader_passes)}
    outcome.measured.append(Measured(stage, label, evaluation, seconds, before, ", ".join(notes), metrics))
    if stage == "reest":
        outcome.except_for(
            "not re-estimated", [(name, "has no running statistics") for name in handle.without_statistics]
        )
        outcome.except_for("not re-estimated", [(name, "FrozenBatchNorm2d: constants") for name in handle.frozen])
        outcome.except_for("not re-estimated", [(name, "calls F.batch_norm itself") for name in handle.functional])
    return outcome


def _recalibrated_only(setting: Setting, sim: nn.Module, before: str) -> Measured:
    """What new ranges do on their own, so that the two effects are not mixed."""
    alone = copy.deepcopy(sim)
    _, seconds = timed(lambda: calibrate_stage(setting, alone, "recalibrate only"))
    evaluation = setting.evaluate(alone, "recal_only: evaluate")
    note = "for comparison"
    return Measured("recal_only", "recalibrate only", evaluation, seconds, before, note)
