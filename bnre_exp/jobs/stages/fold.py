"""Folding, its proof, and biases on the integer grid."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from bnre_exp.algorithms.bias import BiasReport, quantize_biases
from bnre_exp.algorithms.compare import compare_outputs
from bnre_exp.algorithms.fold import FoldReport, fold_batch_norms
from bnre_exp.algorithms.fold_loss import FoldLoss, fold_loss
from bnre_exp.algorithms.integers import integer_simulation
from bnre_exp.algorithms.size import packed_megabytes
from bnre_exp.config import Config
from bnre_exp.errors import UserError, counted
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.network import Form, Result
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.setting import Setting, seed, timed
from bnre_exp.quantsim.listing import list_layers
from bnre_exp.report.layers import layers_columns

LARGEST_FOLD_ERROR = 1e-2  # relative to the largest output; float32 rounding stays far below, a wrong fold far above


def _fold(config: Config, sim: nn.Module) -> tuple[nn.Module, FoldReport]:
    return fold_batch_norms(sim, mode=config.fold.mode.value)


def _fold_again(setting: Setting, folder: Path, before: Result) -> nn.Module:
    """A folded network follows from the simulation before it at once, and is not kept."""
    folded, _ = _fold(setting.config, before.take())
    if setting.config.fold.bias_bits is not None:
        quantize_biases(folded, setting.config.fold.bias_bits)
    return folded


FOLDED = Form(lambda folder, network: None, _fold_again)


def fold(setting: Setting, given: Given) -> tuple[Outcome, nn.Module]:
    """Fold a copy of the simulation, compare and evaluate it."""
    outcome, config, sim = Outcome(), setting.config, given.network
    before, headline = setting.evaluations[given.before], setting.task.headline
    seed(config, "fold")
    outcome.layers = layers_columns(list_layers(sim))  # before the BNs are folded: where each of them goes
    (folded, report), seconds = timed(lambda: _fold(config, sim))
    outcome.except_for("BN not folded", report.kept)
    costs = {loss.layer: _cost(loss) for loss in fold_loss(sim, config.fold.mode.value)} if report.lossy else {}
    outcome.except_for("folded with loss", [(name, costs.get(name, reason)) for name, reason in report.lossy])
    outcome.except_for("note", report.notes)
    difference = compare_outputs(sim, folded, setting.loaders.test, task=setting.task, progress=setting.progress)
    if not math.isfinite(difference.magnitude):
        raise UserError(
            "Folding cannot be checked: without its activation quantizers the network's outputs are not finite. Its "
            f"training has most likely diverged ({headline.label} before folding: {before.value:.4f}); try a lower "
            "qat.lr, or another seed."
        )
    if not report.lossy and not difference.relative <= LARGEST_FOLD_ERROR:
        raise RuntimeError(
            f"Folding changed the network: its outputs differ by {difference.relative:.2e} of the largest. This is a "
            "defect of bnre_exp; please report it with the network and the configuration."
        )
    unrounded = setting.evaluate(folded, "fold: evaluate", as_shipped=True)
    metrics = {
        "max_abs_logit_diff": difference.largest,
        "max_rel_logit_diff": difference.relative,
        f"{headline.name}_agreement": setting.task.agreement(unrounded.predictions, before.predictions),
        "folded_bns": float(len(report.folded)),
        "kept_bns": float(len(report.kept)),
    }
    if config.fold.bias_bits is not None:
        _report_biases(outcome, quantize_biases(folded, config.fold.bias_bits))
    shipped = integer_simulation(folded)
    evaluation = setting.evaluate(shipped, "fold: evaluate", as_shipped=True)
    if config.fold.bias_bits is not None:
        metrics[f"bias_delta_{headline.name}"] = evaluation.value - unrounded.value
    metrics["megabytes"] = packed_megabytes(folded)
    if setting.loaders.validation is not None:  # what a search may use: test data are only reported
        held_out = setting.evaluate(shipped, "fold: validate", on_validation=True, as_shipped=True)
        metrics[f"val_{headline.name}"] = held_out.value
    note = _note(report, difference.relative)
    outcome.measured.append(Measured("fold", "fold", evaluation, seconds, given.before, note, metrics))
    return outcome, folded


def _cost(loss: FoldLoss) -> str:
    return f"{loss.reason}, relative error {loss.error:.3f}" + (f"; {loss.remedy}" if loss.remedy else "")


def _note(report: FoldReport, difference: float) -> str:
    return f"{counted(len(report.folded), 'BN')} folded, {len(report.kept)} not; outputs differ by {difference:.0e}"


def _report_biases(outcome: Outcome, biases: BiasReport) -> None:
    outcome.except_for("bias not rounded", biases.kept)
    raised = [(name, f"weight scale of {n} channels raised so that the bias fits") for name, n in biases.rescaled]
    outcome.except_for("note", raised)
