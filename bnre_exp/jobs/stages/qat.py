"""Quantization-aware training of the simulation."""

from __future__ import annotations

from typing import Any

from torch import nn

from bnre_exp.algorithms.bn_statistics import has_running_statistics
from bnre_exp.algorithms.oscillation import Oscillations, track_oscillations
from bnre_exp.algorithms.reestimate import ReestimationHandle, reestimate_bn_stats
from bnre_exp.config import Oscillation, QatBn, QatConfig, QatValidate
from bnre_exp.errors import UserError, counted
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.jobs.stages.training import train_stage
from bnre_exp.quantsim.sim import weight_quantizers

# Fields that only one choice of qat.oscillation reads.
OF_METHOD = {"qat.dampening": Oscillation.dampening} | dict.fromkeys(
    ("qat.freeze_from", "qat.freeze_to"), Oscillation.freezing
)


def qat_settings(setting: Setting, own: dict[str, Any]) -> dict[str, Any]:
    """What is done before the first step is a stage of its own, and of the others those count that are in use."""
    how = setting.config.qat
    frozen_from, left_out = _frozen_from(how), {"qat.prepare", "qat.bn", "qat.freeze_bn_epoch"}
    left_out |= {name for name, method in OF_METHOD.items() if how.oscillation is not method}
    if how.bn_momentum is None or frozen_from == 1:
        left_out.add("qat.bn_momentum")
    if setting.loaders.validation is None or how.validate is QatValidate.as_is:
        left_out |= {"qat.validate", "qat.validate_batches"}
    kept = {name: value for name, value in own.items() if name not in left_out and value is not None}
    return kept if frozen_from is None else {**kept, "qat.freeze_bn_epoch": frozen_from}


def check_qat(how: QatConfig, sim: nn.Module) -> None:
    """Raise ``UserError`` if there is to be QAT, and weights of the simulation cannot be followed as is asked for."""
    if not how.epochs:
        return
    try:
        _watch(how, sim)
    except UserError as error:
        raise UserError(f"qat.oscillation={how.oscillation.value}: {error}") from error


def qat(setting: Setting, given: Given) -> tuple[Outcome, nn.Module]:
    """Train the simulation in place, and evaluate it."""
    outcome, how, sim = Outcome(), setting.config.qat, given.network
    watch = _watch(how, sim)
    control: dict[str, Any] = {
        "freeze_bn_epoch": _frozen_from(how), "bn_momentum": how.bn_momentum, "ema_decay": how.ema_decay,
        "oscillations": watch,
    }  # fmt: skip
    if how.validate is QatValidate.reestimated and has_running_statistics(sim):
        control["before_validation"] = lambda network: _as_shipped(setting, network)
    seconds = train_stage(setting, "qat", given, how.epochs, how, outcome, **control)
    notes = [f"trained for {counted(how.epochs, 'epoch')}"]
    if watch is not None:
        outcome.tables["oscillating weights"] = _table(watch)
        notes += [f"{share:.1%} of weights {name}" for name, share in watch.shares().items()]
    elif how.oscillation is not Oscillation.none:
        outcome.except_for("note", [("qat.oscillation", "no weights are quantized, so none can oscillate")])
    evaluation = setting.evaluate(sim, "qat: evaluate")
    outcome.measured.append(Measured("qat", "QAT", evaluation, seconds, after=given.before, note=", ".join(notes)))
    return outcome, sim


def _frozen_from(how: QatConfig) -> int | None:
    """The epoch, counted from 1, from which on BN statistics stand still; None: they never do."""
    if how.bn is QatBn.frozen:
        return 1
    return how.freeze_bn_epoch if how.freeze_bn_epoch is not None and how.freeze_bn_epoch <= how.epochs else None


def _watch(how: QatConfig, sim: nn.Module) -> Oscillations | None:
    """What follows the integer weights, where there are any."""
    if not weight_quantizers(sim):
        return None
    return track_oscillations(
        sim, method=how.oscillation.value, momentum=how.oscillation_momentum, dampening=how.dampening,
        freeze_from=how.freeze_from, freeze_to=how.freeze_to,
    )  # fmt: skip


def _as_shipped(setting: Setting, sim: nn.Module) -> ReestimationHandle:
    """Re-estimate in place, from the batches that the stage of re-estimation begins with; the handle undoes it."""
    batches, count = setting.loaders.fresh("reestimation"), setting.config.qat.validate_batches
    return reestimate_bn_stats(sim, batches, count, setting.task.feed, **setting.speed)


def _table(watch: Oscillations) -> dict[str, list[str]]:
    """Layer by layer, which parts of the weights oscillate and are frozen."""
    rows = watch.by_layer()
    frozen = {"frozen": [f"{row.frozen:.2%}" for row in rows]} if watch.method == "freezing" else {}
    return {
        "layer": [row.layer for row in rows],
        "weights": [str(row.weights) for row in rows],
        "oscillating": [f"{row.oscillating:.2%}" for row in rows],
        **frozen,
    }
