"""Which stages a job has, and all that the result of each depends on, which is its key in the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bnre_exp.config import Config, flatten
from bnre_exp.fingerprint import PACKAGE, code_digest, digest, environment, tensors_digest, users_code
from bnre_exp.steps.fp32 import epochs_of
from bnre_exp.steps.setting import Setting
from bnre_exp.targets import resolve_target

# What of the configuration a stage reads itself; what the stages before it read comes with their keys.
SECTIONS = {"fp32": "train", "ptq": "quant", "qat": "qat", "reest": "reest", "fold": "fold", "export": None}
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
        if stage == "fp32":
            epochs = epochs_of(
                setting
            )  # train.epochs=null is the dataset's number; without training nothing else counts
            own = {**own, "train.epochs": epochs} if epochs else {"train.epochs": 0}
        shown = {**shown, **own}
        depends: dict[str, Any] = {"stage": stage, "config": own, "code": code_digest([f"{PACKAGE}.steps.{stage}"])}
        if planned:
            depends["upstream"] = digest(planned[-1].depends)
        else:
            depends.update(_origin(setting))
        planned.append(Planned(stage, depends, shown))
    return planned


def _origin(setting: Setting) -> dict[str, Any]:
    """What everything depends on: the network as it was built, the data, the seed, the machine, and the code."""
    config, module = setting.config, setting.built.module
    targets = [resolve_target(config.model._target_, "model"), resolve_target(config.dataset._target_, "dataset")]
    modules = {str(getattr(target, "__module__", "")) for target in targets}
    modules |= {type(part).__module__ for part in module.modules()}
    return {
        "network": tensors_digest(module.state_dict()),
        "structure": digest(str(module)),
        "leaf_modules": list(config.model.leaf_modules),
        "data": setting.loaders.identity,
        "data_code": code_digest([f"{PACKAGE}.data"]),
        "users_code": users_code(sorted(name for name in modules if name)),
        "environment": environment(),
        "seed": config.seed,
        "runtime": {
            "device": setting.device.type,
            "threads": torch.get_num_threads(),
            "precision": config.runtime.precision.value,
            "memory_format": config.runtime.memory_format.value,
        },
    }
