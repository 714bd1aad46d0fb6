"""From the FP32 network to its quantization simulation, with ranges calibrated: post-training quantization (PTQ)."""

from __future__ import annotations

from torch import fx, nn

from bnre_exp.algorithms.evaluate import evaluate
from bnre_exp.jobs.stages.calibration import calibrate_stage
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.setting import Setting, scheme, seed, timed
from bnre_exp.jobs.stages.snapshots import SnapshotFolder
from bnre_exp.quantsim.insert import quantize
from bnre_exp.quantsim.sim import sim_report


def ptq(setting: Setting, network: nn.Module, snapshots: SnapshotFolder | None) -> tuple[Outcome, nn.Module]:
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
