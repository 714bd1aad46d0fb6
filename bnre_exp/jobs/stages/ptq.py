"""From the FP32 network to its quantization simulation, with ranges calibrated: post-training quantization (PTQ)."""

from __future__ import annotations

from typing import Optional

from torch import fx, nn

from bnre_exp.quantsim.insert import quantize, sim_report
from bnre_exp.stages.evaluate import evaluate
from bnre_exp.steps.calibration import calibrate_stage
from bnre_exp.steps.outcome import Measured, Outcome
from bnre_exp.steps.setting import Setting, scheme, seed, timed
from bnre_exp.steps.training import SnapshotFolder


def ptq(setting: Setting, network: nn.Module, snapshots: Optional[SnapshotFolder]) -> tuple[Outcome, nn.Module]:
    """Quantize a copy of the network, calibrate and evaluate it."""
    outcome, config = Outcome(), setting.config
    seed(config, "ptq")

    def work() -> fx.GraphModule:
        sim = quantize(network, setting.example(), scheme(config), leaf_modules=config.model.leaf_modules)
        calibrate_stage(setting, sim, "ptq")
        return sim

    sim, seconds = timed(work)
    report = sim_report(sim)
    outcome.except_for("not quantized", report.unquantized)
    outcome.except_for("note", [("network", note) for note in report.notes])
    evaluation = evaluate(sim, setting.loaders.test, progress=setting.progress, description="ptq: evaluate")
    outcome.measured.append(Measured("ptq", "quantize + calibrate", evaluation, seconds, after="fp32"))
    return outcome, sim
