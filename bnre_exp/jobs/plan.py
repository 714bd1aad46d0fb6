"""Which stages a job has, and all that the result of each depends on, which is its key in the store."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bnre_exp.algorithms.snapshot import hidden_buffers
from bnre_exp.config import Config, RangeEstimator, ReestMethod, flatten
from bnre_exp.digests import digest, tensors_digest
from bnre_exp.jobs.code_identity import PACKAGE, code_digest, environment, users_code
from bnre_exp.jobs.stages.fp32 import epochs_of
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.targets import resolve_target

# What of the configuration a stage reads itself; what the stages before it read comes with their keys.
SECTIONS = {"fp32": "train", "ptq": "quant", "qat": "qat", "reest": "reest", "fold": "fold", "export": "export"}
RUNTIME = ("runtime.precision", "runtime.memory_format")


@dataclass(frozen=True)
class Planned:
    """One stage. depends: what its key is made of; config: settings that it and the stages before it depend on."""

    stage: str
    depends: Mapping[str, Any]
    config: Mapping[str, Any]


def stages_of(config: Config) -> list[str]:
    """The stages that are on, in order."""
    off = {"qat": config.qat.epochs == 0, "reest": config.reest.num_batches == 0}
    return [stage for stage in SECTIONS if not off.get(stage)]


def plan(setting: Setting) -> list[Planned]:
    """The stages of a job, with their keys; the network must be as it was built, and torch's threads set."""
    flat = flatten(setting.config)
    shown = {name: value for name, value in flat.items() if name.startswith(("model.", "dataset.")) or name in RUNTIME}
    shown["seed"] = setting.config.seed
    planned: list[Planned] = []
    for stage in stages_of(setting.config):
        section = SECTIONS[stage]
        own = {name: value for name, value in flat.items() if section and name.startswith(f"{section}.")}
        own = {name: value for name, value in own.items() if name not in _without_effect(setting.config)}
        if stage == "fp32":
            epochs = epochs_of(
                setting
            )  # train.epochs=null is the dataset's number; without training nothing else counts
            own = {**own, "train.epochs": epochs} if epochs else {"train.epochs": 0}
        shown = {**shown, **own}
        if stage == "ptq":
            own = {**own, "model.leaf_modules": list(setting.config.model.leaf_modules)}
        depends: dict[str, Any] = {
            "stage": stage,
            "config": own,
            "code": code_digest([f"{PACKAGE}.jobs.stages.{stage}"]),
        }
        if planned:
            depends["upstream"] = digest(planned[-1].depends)
        else:
            depends.update(_origin(setting))
        planned.append(Planned(stage, depends, shown))
    return planned


def _without_effect(config: Config) -> set[str]:
    estimators = {config.quant.weight_range, config.quant.act_range}
    unused = set() if RangeEstimator.percentile in estimators else {"quant.percentile"}
    return unused if config.reest.method is ReestMethod.ema else unused | {"reest.momentum"}


def _origin(setting: Setting) -> dict[str, Any]:
    """What everything depends on: the network as it was built, the data, the seed, the machine, and the code."""
    config, module = setting.config, setting.built.module
    hidden = {name: buffer for name, buffer in hidden_buffers(module).items() if buffer.numel()}
    return {
        "model": [config.model._target_, config.model.name, flatten(config.model.kwargs)],
        "network": tensors_digest({**module.state_dict(), **hidden}),
        "structure": digest(re.sub(r" at 0x[0-9a-f]+", "", str(module))),
        "dataset": [config.dataset._target_, flatten(config.dataset.kwargs)],
        "data": setting.loaders.identity,
        "data_code": code_digest([f"{PACKAGE}.data"]),
        "users_code": users_code(_modules(config) | {type(part).__module__ for part in module.modules()}),
        "environment": environment(),
        "seed": config.seed,
        "runtime": {
            "device": setting.device.type,
            "threads": torch.get_num_threads() if setting.device.type == "cpu" else None,
            "precision": config.runtime.precision.value,
            "memory_format": config.runtime.memory_format.value,
            "torch": [
                str(torch.get_default_dtype()),
                torch.get_float32_matmul_precision(),
                torch.are_deterministic_algorithms_enabled(),
                torch.backends.mkldnn.enabled,
                torch.backends.cudnn.allow_tf32,
            ],
        },
    }


def _modules(config: Config) -> set[str]:
    """Modules of the user's callables: those that the paths name (names of attributes among them do no harm), and
    those that they are from."""
    found: set[str] = set()
    for target in (config.model._target_, config.dataset._target_):
        parts = target.replace(":", ".").split(".")
        found |= {".".join(parts[:n]) for n in range(1, len(parts))}
        found.add(str(getattr(resolve_target(target, "_target_"), "__module__", "") or ""))
    return {name for name in found if name}


def code_identity(config: Config) -> str:
    """Digest of all code that a job of this configuration runs, ours and the user's."""
    own = code_digest([f"{PACKAGE}.jobs.stages.{stage}" for stage in SECTIONS] + [f"{PACKAGE}.data"])
    return digest([own, users_code(_modules(config)), environment()])
