"""Re-estimation alone, of a copy of the network that QAT starts from: what is gained without any training."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from bnre_exp.errors import UserError
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.outcome import Outcome
from bnre_exp.jobs.stages.reest import re_estimated, reest_settings
from bnre_exp.jobs.stages.setting import Setting, seed

NOT_MEASURED = ("reest.curve", "reest.ablate")


def reest_only_settings(setting: Setting, own: dict[str, Any]) -> dict[str, Any]:
    """As of re-estimation; its curve and its ablation are not measured here."""
    return {name: value for name, value in reest_settings(setting, own).items() if name not in NOT_MEASURED}


def reest_only(setting: Setting, given: Given) -> tuple[Outcome, nn.Module]:
    """What re-estimation brings without the training that follows. Of a copy, and if it fails QAT goes on."""
    seed(setting.config, "reest")
    try:
        sim = copy.deepcopy(given.network)
        outcome = re_estimated(setting, given, sim, False, "reest_only", "re-estimate only")
    except UserError as error:
        outcome = Outcome()
        outcome.except_for("note", [("re-estimation without QAT", str(error))])
    return outcome, given.network
