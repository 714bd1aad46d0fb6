"""BN re-estimation, and what activation ranges need around it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from bnre_exp.algorithms.ablation import reestimate_each_alone
from bnre_exp.algorithms.drift import bn_drift, drift_columns
from bnre_exp.algorithms.feeding import FirstSamples
from bnre_exp.algorithms.observed import observed_statistics, self_consistency
from bnre_exp.algorithms.reestimate import ReestimationHandle, reestimate_bn_stats
from bnre_exp.config import ActQuant, Recalibrate, ReestConfig, ReestImages, ReestMethod
from bnre_exp.errors import counted
from bnre_exp.jobs.stages.calibration import calibrate_stage
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.setting import Setting, seed, timed
from bnre_exp.quantsim.sim import activation_quantizers, bypassed, in_use

CONSISTENCY_BATCHES = 10
SMALL_BATCH = 32  # MobileNetV2, W3A8, on Fashion-MNIST: with batches of 8, batch_average is 1.25 points below pooled


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
    is_main = stage == "reest"
    alone = _each_alone(setting, sim, bypass) if is_main and how.ablate else None
    curve = _Curve(setting, sim, again)

    def work() -> Any:
        with bypassed(sim, activations=bypass):
            return reestimate_bn_stats(
                sim, lambda: reestimation_batches(setting), most_batches(setting), setting.task.feed,
                method=how.method.value, momentum=how.momentum, tolerance=how.tolerance, prior=how.prior,
                passes=how.passes, layers=how.layers or None, curve=how.curve if is_main else (),
                measure=curve.measure, **setting.speed, progress=setting.progress,
            )  # fmt: skip

    handle, seconds = timed(work)
    metrics = {"loader_passes": float(handle.loader_passes), "batches": float(handle.num_batches)}
    metrics["samples"] = float(handle.samples)
    if is_main:
        _tell(setting, outcome, sim, handle, alone, bypass)
        outcome.curves += [
            (number, {f"reest/val_{name}": v for name, v in found.items()}) for number, found in handle.curve
        ]
    if again:
        _, outcome.metrics[f"{stage}/recalibrate_seconds"] = timed(lambda: calibrate_stage(setting, sim, "recalibrate"))
    evaluation = setting.evaluate(sim, f"{stage}: evaluate")
    note = ", ".join(
        [*_notes(handle, how), *(["then recalibrated"] if again else []), *([] if is_main else ["for comparison"])]
    )
    outcome.measured.append(Measured(stage, label, evaluation, seconds - curve.seconds, before, note, metrics))
    return outcome


def reestimation_batches(setting: Setting) -> Iterable[Any]:
    """The batches of re-estimation, from the seed."""
    how = setting.config.reest
    loader = setting.loaders.fresh("train" if how.augment is ReestImages.train else "reestimation")
    return loader if how.num_samples is None else FirstSamples(loader, how.num_samples)


def most_batches(setting: Setting) -> int:
    """How many of them are taken at most."""
    how, size = setting.config.reest, setting.config.dataset.batch_size
    return how.num_batches if how.num_samples is None else -(-how.num_samples // size)


class _Curve:
    """Evaluates the validation data on the way, as re-estimation would end there. again: with ranges fitted anew.
    seconds: that this took."""

    def __init__(self, setting: Setting, sim: nn.Module, again: bool) -> None:
        self._setting, self._sim, self._again, self.seconds = setting, sim, again, 0.0

    def measure(self) -> dict[str, float]:
        metrics, seconds = timed(self._measured)
        self.seconds += seconds
        return metrics

    def _measured(self) -> dict[str, float]:
        ranges = {q: copy.deepcopy(q.state_dict()) for q in activation_quantizers(self._sim).values()}
        with in_use(self._sim):
            if self._again:
                calibrate_stage(self._setting, self._sim, "curve")
            metrics = dict(self._setting.evaluate(self._sim, "reest: curve", on_validation=True).metrics)
        for quantizer, state in ranges.items():
            quantizer.load_state_dict(state)
        return metrics


def _each_alone(setting: Setting, sim: nn.Module, bypass: bool) -> dict[str, float]:
    """By the name of each BN, the change of the headline metric on the validation data by re-estimating it alone."""

    def measure() -> float:
        return setting.evaluate(sim, "reest: one alone", on_validation=True).value

    with bypassed(sim, activations=bypass):
        start, method = measure(), setting.config.reest.method.value
        found = reestimate_each_alone(
            sim, reestimation_batches(setting), measure, most_batches(setting), setting.task.feed, method=method,
            progress=setting.progress,
        )  # fmt: skip
    return {name: value - start for name, value in found.items()}


def _notes(handle: ReestimationHandle, how: ReestConfig) -> list[str]:
    notes = [counted(handle.num_batches, "batch", "batches"), counted(handle.loader_passes, "pass", "passes")]
    if how.num_samples is not None:
        notes = [counted(handle.samples, "image")]
    if handle.largest is not None and how.tolerance is not None:
        name, error = handle.largest
        reached = "stopped" if error <= how.tolerance else f"tolerance {how.tolerance:g} not reached"
        notes.append(f"{reached}: standard errors up to {error:.3f}, the largest in {name}")
    return notes


def _tell(
    setting: Setting, outcome: Outcome, sim: nn.Module, handle: ReestimationHandle, alone: dict[str, float] | None,
    bypass: bool,
) -> None:  # fmt: skip
    """What moved, what did not, and how consistent the statistics are with what the layers now get."""
    columns = drift_columns(bn_drift(sim, handle.before, handle.after))
    if alone is not None:
        columns[f"{setting.task.headline.label} alone"] = [alone.get(str(name), 0.0) for name in columns["BN"]]
    outcome.drift = columns
    outcome.metrics["reest/kl_mean"] = sum(map(float, columns["KL [nats]"])) / max(1, len(columns["BN"]))
    bns = {module: name for name, module in sim.named_modules() if name in handle.after}
    count = min(most_batches(setting), CONSISTENCY_BATCHES)
    with bypassed(sim, activations=bypass):
        found = observed_statistics(
            sim, bns, reestimation_batches(setting), count, setting.task.feed, **setting.precision
        )
    used = {bn: handle.after[name] for bn, name in bns.items()}
    outcome.metrics["reest/self_consistency"] = self_consistency(used, found)
    size = handle.samples / handle.num_batches
    if setting.config.reest.method is ReestMethod.batch_average and size < SMALL_BATCH:
        why = (
            f"batch_average of batches of {size:.0f} leaves out the spread between them; reest.method=pooled has it, "
            "or take larger batches (dataset.batch_size)"
        )
        outcome.except_for("note", [("re-estimation", why)])
    outcome.except_for("not re-estimated", [(name, "has no running statistics") for name in handle.without_statistics])
    outcome.except_for("not re-estimated", [(name, "FrozenBatchNorm2d: constants") for name in handle.frozen])
    outcome.except_for("not re-estimated", [(name, "calls F.batch_norm itself") for name in handle.functional])


def _recalibrated_only(setting: Setting, sim: nn.Module, before: str) -> Measured:
    """What new ranges do on their own, so that the two effects are not mixed."""
    alone = copy.deepcopy(sim)
    _, seconds = timed(lambda: calibrate_stage(setting, alone, "recalibrate only"))
    evaluation = setting.evaluate(alone, "recal_only: evaluate")
    note = "for comparison"
    return Measured("recal_only", "recalibrate only", evaluation, seconds, before, note)
