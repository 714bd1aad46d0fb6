"""The quantization simulation of a job: its scheme, and how it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from bnre_exp.config import Config
from bnre_exp.jobs.stages.network import Form, Result, load_state, notes_of, save_state
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.quantsim.insert import rebuild_sim
from bnre_exp.quantsim.quantizers.scheme import LayerRule, QuantScheme
from bnre_exp.quantsim.sim import sim_report
from bnre_exp.quantsim.tracing.whole import BOTH, EVALUATION


def scheme(config: Config) -> QuantScheme:
    """The quantization scheme that the configuration describes."""
    quant = config.quant
    rules = tuple(LayerRule(o.pattern, o.weight_bits, o.act_bits, o.off) for o in quant.overrides)
    return QuantScheme(
        weight_bits=quant.weight_bits, act_bits=quant.act_bits, per_channel=quant.per_channel,
        range_learning=quant.range_learning, first_last_bits=quant.first_last_bits, overrides=rules,
        weight_range=quant.weight_range.value, act_range=quant.act_range.value, percentile=quant.percentile,
        weight_grid=quant.weight_grid.value,
    )  # fmt: skip


def modes(config: Config) -> str:
    """What the simulation is for: a network whose training mode cannot be simulated is taken where there is no QAT."""
    return BOTH if config.qat.epochs else EVALUATION


def _keep(folder: Path, sim: nn.Module) -> None:
    save_state(folder, sim, {"modes": json.dumps(sim_report(sim).modes_by_part)})


def _restore(setting: Setting, folder: Path, before: Result) -> nn.Module:
    how: dict[str, Any] = {
        "leaf_modules": setting.config.model.leaf_modules,
        "modes": json.loads(notes_of(folder)["modes"]),
    }
    sim = rebuild_sim(setting.built.module, setting.example(), scheme(setting.config), **how)
    return load_state(folder, sim)


SIM = Form(_keep, _restore)
