"""Which stages a job has, and all that the result of each depends on, which is its key in the store."""

from __future__ import annotations

import logging
import os
import platform
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import features

from bnre_exp.algorithms.snapshot import hidden_buffers
from bnre_exp.config import Config, flatten
from bnre_exp.digests import digest, tensors_digest
from bnre_exp.jobs.code_identity import PACKAGE, code_digest, python_version, users_code, versions
from bnre_exp.jobs.network_identity import network_identity
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.jobs.stages.stage import Stage
from bnre_exp.jobs.stages.table import STAGES, stages_of
from bnre_exp.targets import resolve_target

# What every stage computes with: versions of these, and the code of seeds and batches.
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "torchmetrics", "pycocotools")
DATA_CODE = (
    "digests", "data.spec", "data.loaders", "data.splits", "data.reading", "data.batches", "data.items", "data.listed",
    "data.samples", "data.geometry", "data.preprocess", "data.pictures", "data.datasets", "data.pairs",
    "data.data_yaml",
)  # fmt: skip
logger = logging.getLogger(__name__)

VECTORS = ("avx", "amx", "fma", "sve")  # instructions by which kernels are chosen
CHOOSING = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")  # so that others are
SHOWN = ("model.", "dataset.", "task.", "runtime.precision", "runtime.compile", "runtime.memory_format")


@dataclass(frozen=True)
class Planned:
    """One stage of a job. before: the row that its headline metric is compared with; depends: what its key is made of;
    config: settings that it and the stages before it depend on."""

    stage: Stage
    before: str
    depends: Mapping[str, Any]
    config: Mapping[str, Any]


def plan(setting: Setting) -> list[Planned]:
    """The stages of a job, with their keys; the network must be as it was built, and torch's threads set."""
    flat = flatten(setting.config)
    shown = {name: value for name, value in flat.items() if name.startswith(SHOWN)}
    shown["seed"] = setting.config.seed
    planned: dict[str, Planned] = {}
    for stage in stages_of(setting.config):
        section = {name: value for name, value in flat.items() if name.startswith(f"{stage.section}.")}
        own = stage.settings(setting, section)
        shown = {**shown, **own}
        uses = stage.uses(setting.config)
        depends: dict[str, Any] = {
            "stage": stage.name, "config": own, "code": code_digest(uses.code), "libraries": versions(uses.libraries),
        }  # fmt: skip
        before = next((name for name in stage.follows if name in planned), "")
        depends.update({"upstream": digest(planned[before].depends)} if before else _origin(setting))
        planned[stage.name] = Planned(stage, before, depends, shown)
    return list(planned.values())


def _origin(setting: Setting) -> dict[str, Any]:
    """What everything depends on: the network as it was built, the task, the data, the seed, the machine, and code."""
    config, module = setting.config, setting.built.module
    hidden = {name: buffer for name, buffer in hidden_buffers(module).items() if buffer.numel()}
    classes = {type(part).__module__ for part in module.modules()}
    loads = getattr(resolve_target(config.dataset._target_, "dataset._target_"), "__module__", None) or ""
    ours = [name.removeprefix(f"{PACKAGE}.") for name in {*classes, loads} if name.startswith(f"{PACKAGE}.")]
    return {
        "model": [config.model._target_, config.model.name, flatten(config.model.kwargs)],
        "network": tensors_digest({**module.state_dict(), **hidden}),
        "structure": _structure(setting),
        "task": [config.task._target_, flatten(config.task.kwargs)],
        "dataset": [config.dataset._target_, flatten(config.dataset.kwargs)],
        "data": setting.loaders.identity,
        "data_code": code_digest([*DATA_CODE, *ours]),
        "users_code": users_code(_modules(config) | classes),
        "environment": {"python": python_version(), **versions(LIBRARIES), **_builds()},
        "seed": config.seed,
        "runtime": {
            "device": _device(setting.device),
            "precision": config.runtime.precision.value,
            "compile": config.runtime.compile,
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


def _structure(setting: Setting) -> str:
    """What the network computes; where that cannot be told, what no other job has, so that none takes its results."""
    found, unknown = network_identity(setting.built.module, setting.example(), setting.config.model.leaf_modules)
    if not unknown:
        return found
    logger.warning(
        "What the network computes cannot be told from its parts: it cannot be traced, and holds %s. Its results are "
        "not found again by other jobs, nor by this one. Keep such objects out of the network's attributes.",
        ", ".join(sorted(set(unknown))),
    )
    return uuid.uuid4().hex


def _builds() -> dict[str, str]:
    """What versions do not tell: builds of torch, and the decoder that Pillow was built with."""
    return {
        "torch build": f"{torch.__version__} {torch.version.git_version}",
        "jpeg": f"{features.version('jpg')} {features.version('libjpeg_turbo')}",
    }


def _device(device: torch.device) -> list[Any]:
    """The processor that computes: kernels are chosen by its instructions, and with their order of sums the last bits
    change. Threads count on the CPU only."""
    if device.type != "cpu":
        return [device.type, torch.cuda.get_device_name(device), torch.version.cuda, torch.backends.cudnn.version()]
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    vectors = sorted(name for name, has in known.items() if has is True and name.startswith(VECTORS))
    own = [torch.backends.cpu.get_cpu_capability(), *(os.environ.get(name) for name in CHOOSING)]
    return [device.type, platform.machine(), *vectors, *own, torch.get_num_threads()]


def _modules(config: Config) -> set[str]:
    """Modules of the user's callables: those that the paths name (names of attributes among them do no harm), and
    those that they are from."""
    found: set[str] = set()
    for target in (config.model._target_, config.dataset._target_, config.task._target_):
        parts = target.replace(":", ".").split(".")
        found |= {".".join(parts[:n]) for n in range(1, len(parts))}
        found.add(str(getattr(resolve_target(target, "_target_"), "__module__", "") or ""))
    return {name for name in found if name}


def code_identity(config: Config) -> str:
    """Digest of all code that a job of this configuration runs, ours and the user's."""
    uses = [stage.uses(config) for stage in STAGES]
    code = code_digest([name for use in uses for name in use.code] + list(DATA_CODE))
    libraries = versions([*LIBRARIES, *(name for use in uses for name in use.libraries)])
    return digest([code, users_code(_modules(config)), python_version(), libraries])
