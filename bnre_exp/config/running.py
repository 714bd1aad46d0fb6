"""How and where the work of a job is done, and where its results go: a dataclass a config group."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from bnre_exp.config.choices import Device, MemoryFormat, Precision, StoreMode
from bnre_exp.config.fields import check_bounds, opt
from bnre_exp.errors import UserError


@dataclass
class RuntimeConfig:
    """How and where the work is done."""

    group: ClassVar[str] = "runtime"
    device: Device = opt(Device.auto, "cpu, cuda, or auto: cuda where there is one")
    precision: Precision = opt(Precision.float32, "of training: float32, or bfloat16 (autocast)")
    threads: int | None = opt(None, "CPU threads of torch; null: torch's own choice", ge=1)
    memory_format: MemoryFormat = opt(MemoryFormat.channels_last, "channels_last or contiguous")
    workers: int = opt(0, "data-loading processes; 0: load in the main process", ge=0)
    output_dir: str = opt("outputs", "folder of everything that a run writes")

    def __post_init__(self) -> None:
        check_bounds(self, self.group)
        if not self.output_dir:
            raise UserError("runtime.output_dir is empty: expected the path of a folder.")
        self.output_dir = os.path.abspath(os.path.expanduser(self.output_dir))


@dataclass
class StoreConfig:
    """Stage results that later jobs find again."""

    group: ClassVar[str] = "store"
    mode: StoreMode = opt(
        StoreMode.reuse, "reuse; refresh: compute anew and replace; off: keep nothing, and nothing to resume from"
    )
    dir: str | None = opt(None, "folder of the store; null: store in runtime.output_dir")
    max_gb: float = opt(20.0, "size above which the least recently used results go [GB, 1e9 bytes]", gt=0)

    def __post_init__(self) -> None:
        check_bounds(self, self.group)
        self.dir = os.path.abspath(os.path.expanduser(self.dir)) if self.dir else None


@dataclass
class TrackingConfig:
    """Where results are logged, besides the run's own metrics.jsonl."""

    group: ClassVar[str] = "tracking"
    enabled: bool = opt(True, "false: nothing goes to MLflow")
    uri: str | None = opt(None, "MLflow tracking URI; null: an SQLite store in runtime.output_dir")
    experiment: str = opt("bnre_exp", "MLflow experiment name")
    run_name: str | None = opt(None, "MLflow run name; null: made of model, dataset, bits and batches")

    def __post_init__(self) -> None:
        if not self.experiment.strip():
            raise UserError("tracking.experiment is empty: expected a name.")
