"""From the FP32 network to its quantization simulation, with ranges calibrated: post-training quantization (PTQ)."""

from __future__ import annotations

from typing import Any

from torch import nn

from bnre_exp.config import RangeEstimator
from bnre_exp.jobs.stages.calibration import calibrate_stage
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.setting import Setting, seed, timed
from bnre_exp.jobs.stages.simulation import modes, scheme
from bnre_exp.quantsim.insert import quantize, quantize_again
from bnre_exp.quantsim.sim import sim_report


def ptq_settings(setting: Setting, own: dict[str, Any]) -> dict[str, Any]:
    """Tracing reads ``model.leaf_modules``; the percentile is that of an estimator which may not be used."""
    config = setting.config
    if RangeEstimator.percentile not in (config.quant.weight_range, config.quant.act_range):
        own = {name: value for name, value in own.items() if name != "quant.percentile"}
    how = config.model
    return {**own, "model.leaf_modules": list(how.leaf_modules), "model.submodules": list(how.submodules)}


def ptq(setting: Setting, given: Given) -> tuple[Outcome, nn.Module]:
    """Quantize a copy of the network, calibrate and evaluate it."""
    outcome, config = Outcome(), setting.config
    seed(config, "ptq")

    def work() -> nn.Module:
        how, leaves = (given.network, setting.example(), scheme(config)), config.model.leaf_modules
        if setting.trial is None:
            parts = config.model.submodules
            sim = quantize(*how, leaf_modules=leaves, modes=modes(config), submodules=parts)
        else:
            sim = quantize_again(*how, setting.trial, leaf_modules=leaves)
        calibrate_stage(setting, sim, "ptq")
        return sim

    sim, seconds = timed(work)
    report = sim_report(sim)
    outcome.except_for("not quantized", report.unquantized)
    why_frozen = "frozen by the network: QAT leaves its statistics as they are, re-estimation does not"
    outcome.except_for("note", [(name, why_frozen) for name in report.frozen_bns])
    outcome.except_for("note", [("network", note) for note in report.notes])
    outcome.except_for("note", [("weights", note) for note in report.weight_notes])
    evaluation = setting.evaluate(sim, "ptq: evaluate")
    outcome.measured.append(Measured("ptq", "quantize + calibrate", evaluation, seconds, after=given.before))
    return outcome, sim
