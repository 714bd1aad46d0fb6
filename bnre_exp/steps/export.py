"""The folded network as files, loaded again and evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnre_exp.export.checkpoint import load_folded, save_folded
from bnre_exp.stages.evaluate import evaluate
from bnre_exp.steps.outcome import Measured, Outcome
from bnre_exp.steps.setting import Setting, seed, timed

FOLDED = "folded"  # the checkpoint's folder


def export(setting: Setting, folded: nn.Module, folder: Path) -> Outcome:
    """Write the checkpoint to ``folder/folded``, load it and compare its predictions with those before."""
    outcome, path = Outcome(), folder / FOLDED
    seed(setting.config, "export")
    network: Any = folded
    foreign, seconds = timed(lambda: save_folded(network, path))
    reason = "outside the checkpoint's allow-list; load_folded needs model="
    outcome.except_for("note", [(name, reason) for name in foreign])
    loaded = load_folded(path, model=folded if foreign else None).to(setting.device)
    evaluation = evaluate(loaded, setting.loaders.test, progress=setting.progress, description="export: evaluate")
    if not torch.equal(evaluation.predictions, setting.evaluations["fold"].predictions):
        raise RuntimeError("The exported checkpoint, loaded again, predicts differently. This is a defect of bnre_exp.")
    megabytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
    metrics = {"megabytes": megabytes}
    outcome.measured.append(Measured("export", "export, loaded again", evaluation, seconds, "fold", "", metrics))
    return outcome
