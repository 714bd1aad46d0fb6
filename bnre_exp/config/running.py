"""How and where the work of a job is done, and where its results go: a dataclass a config group."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from bnre_exp.config.choices import Device, MemoryFormat, Precision, StoreMode
from bnre_exp.config.fields import check_fields, opt
from bnre_exp.errors import UserError

SCHEMES = ("http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")


@dataclass
class RuntimeConfig:
    """How and where the work is done."""

    group: ClassVar[str] = "runtime"
    device: Device = opt(Device.auto, "cpu, cuda, or auto: cuda where there is one")
    precision: Precision = opt(
        Precision.float32, "of training, re-estimation and evaluation before the fold: float32, or bfloat16 (autocast)"
    )
    compile: bool = opt(
        False, "true: these are compiled by torch.compile, which takes a minute or more a network first"
    )
    threads: int | None = opt(None, "CPU threads of torch; null: torch's own choice", ge=1, le=4096)
    memory_format: MemoryFormat = opt(MemoryFormat.channels_last, "channels_last or contiguous")
    workers: int = opt(0, "data-loading processes; 0: load in the main process", ge=0, le=1024)
    output_dir: str = opt("outputs", "folder of everything that a run writes")

    def __post_init__(self) -> None:
        check_fields(self, self.group)
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
    max_gb: float = opt(20.0, "size above which the least recently used results go [GB, 1e9 bytes]", gt=0, le=1e9)

    def __post_init__(self) -> None:
        check_fields(self, self.group)
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
        check_fields(self, self.group)
        if not self.experiment.strip():
            raise UserError("tracking.experiment is empty: expected a name.")
        if self.uri is not None:
            _check_uri(self.uri)


def _check_uri(uri: str) -> None:
    """The form of a tracking URI; it may hold a password, which the message leaves out."""
    scheme, has_scheme, rest = uri.partition("://")
    scheme = scheme.partition("+")[0].lower() if has_scheme else ""  # postgresql+psycopg2
    if not uri.strip() or (has_scheme and scheme not in SCHEMES and not _is_plugin(scheme)):
        raise UserError(
            f"tracking.uri={scheme}{has_scheme}...: MLflow has no such store; expected a folder, http://HOST:PORT, "
            "sqlite:///FILE, or an address of one of: " + ", ".join(SCHEMES) + "."
        )
    if scheme in ("http", "https") and not rest.strip("/"):
        raise UserError(f"tracking.uri={uri}: it names no host; expected http://HOST:PORT.")


def _is_plugin(scheme: str) -> bool:
    """Whether an installed package adds this kind of store to MLflow."""
    from importlib.metadata import entry_points

    return any(point.name == scheme for point in entry_points(group="mlflow.tracking_store"))
