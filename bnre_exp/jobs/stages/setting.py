"""What all stages of a job work with."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnre_exp.algorithms.evaluate import evaluate
from bnre_exp.config import Config
from bnre_exp.data.loaders import Loaders
from bnre_exp.digests import stream_seed
from bnre_exp.models.build import BuiltModel
from bnre_exp.progress import Progress
from bnre_exp.tasks.task import Evaluation, Task


@dataclass
class Setting:
    """config; device; task; data; the untrained network; where progress is shown (``on_metrics(values, step)`` hears of
    training epochs, ``say`` prints a line). trial: the report of the simulation that was made for trial, None if none
    was. evaluations: of the rows that are measured, by name."""

    config: Config
    device: torch.device
    task: Task
    loaders: Loaders
    built: BuiltModel
    progress: Progress
    on_metrics: Callable[[dict[str, float], int], None]
    say: Callable[[str], None]
    trial: Any = None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    @property
    def speed(self) -> dict[str, Any]:
        """How networks are computed before they are folded, as arguments of the algorithms."""
        return {**self.precision, "compile": self.config.runtime.compile}

    @property
    def precision(self) -> dict[str, Any]:
        """The arithmetic of forward passes, as an argument of the algorithms."""
        return {"precision": self.config.runtime.precision.value}

    def evaluate(
        self, network: nn.Module, description: str, on_validation: bool = False, as_shipped: bool = False
    ) -> Evaluation:
        """What a network gives on the test data, or on the validation data. as_shipped: in float32, operation by
        operation."""
        data = self.loaders.validation if on_validation else self.loaders.test
        speed = {} if as_shipped else self.speed
        return evaluate(network, data or (), task=self.task, **speed, progress=self.progress, description=description)

    def example(self) -> Tensor:
        """Two training images on the device."""
        return self.loaders.example().to(self.device)


def seed(config: Config, purpose: str) -> None:
    """Everything random from here on depends on the seed and the purpose, not on what ran before."""
    value = stream_seed(config.seed, purpose)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work()`` returns, and the seconds it took."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def run_name(config: Config) -> str:
    """What a run is called unless ``tracking.run_name`` says: network, dataset, bits, QAT or PTQ, batches."""

    def bits(value: int | None) -> str:
        return "fp" if value is None else str(value)

    file = Path(config.model.path).stem if config.model.path else None
    model = config.model.name or file or config.model._target_.rpartition(".")[2]
    dataset = config.dataset._target_.rpartition(".")[2]
    scheme = f"w{bits(config.quant.weight_bits)}a{bits(config.quant.act_bits)}"
    scheme += "" if config.quant.per_channel else "-per-tensor"
    return f"{model}-{dataset}-{scheme}-{'qat' if config.qat.epochs else 'ptq'}-reest{config.reest.num_batches}"
