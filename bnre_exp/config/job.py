"""The configuration of one job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bnre_exp.config.fields import check_fields, opt
from bnre_exp.config.qat import QatConfig
from bnre_exp.config.reest import ReestConfig
from bnre_exp.config.running import RuntimeConfig, StoreConfig, TrackingConfig
from bnre_exp.config.sections import (
    DatasetConfig,
    ExportConfig,
    FoldConfig,
    Fp32Config,
    ModelConfig,
    QuantConfig,
    TaskConfig,
    TrainConfig,
)


@dataclass
class Config:
    """One run."""

    group: ClassVar[str] = ""
    seed: int = opt(0, "of everything random: weights, sampling, augmentation, splits", ge=0, lt=2**32)
    objective: str | None = opt(
        None, "metric that a search (hydra/sweeper=optuna) optimizes; null: the folded network's, on validation data"
    )
    model: ModelConfig = opt(factory=ModelConfig, doc="the network")
    dataset: DatasetConfig = opt(factory=DatasetConfig, doc="the data")
    task: TaskConfig = opt(factory=TaskConfig, doc="what the network is for")
    train: TrainConfig = opt(factory=TrainConfig, doc="FP32 training")
    fp32: Fp32Config = opt(factory=Fp32Config, doc="what the FP32 network must reach")
    quant: QuantConfig = opt(factory=QuantConfig, doc="the quantization scheme")
    qat: QatConfig = opt(factory=QatConfig, doc="quantization-aware training")
    reest: ReestConfig = opt(factory=ReestConfig, doc="BN re-estimation")
    fold: FoldConfig = opt(factory=FoldConfig, doc="folding")
    export: ExportConfig = opt(factory=ExportConfig, doc="files of the folded network")
    runtime: RuntimeConfig = opt(factory=RuntimeConfig, doc="how and where the work is done")
    store: StoreConfig = opt(factory=StoreConfig, doc="stage results that later jobs find again")
    tracking: TrackingConfig = opt(factory=TrackingConfig, doc="where results are logged")

    def __post_init__(self) -> None:
        check_fields(self, self.group)
