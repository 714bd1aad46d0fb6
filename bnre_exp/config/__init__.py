"""The typed configuration.

The classes know neither Hydra nor MLflow; ``cli`` registers them with Hydra's ConfigStore and turns the composed
configuration into these objects. A field's documentation and range stand in its ``opt``; ``--help`` prints the one,
``__post_init__`` checks the other and raises :class:`~bnre_exp.errors.UserError` with the name the user types.
"""

from bnre_exp.config.choices import (
    ActQuant,
    Device,
    ExportFormat,
    FoldMode,
    MemoryFormat,
    Optimizer,
    Oscillation,
    Precision,
    QatBn,
    QatPrepare,
    QatValidate,
    RangeEstimator,
    Recalibrate,
    ReestImages,
    ReestMethod,
    Schedule,
    StoreMode,
    WeightGrid,
)
from bnre_exp.config.fields import flatten
from bnre_exp.config.job import Config
from bnre_exp.config.qat import QatConfig
from bnre_exp.config.reest import ReestConfig
from bnre_exp.config.running import RuntimeConfig, StoreConfig, TrackingConfig
from bnre_exp.config.sections import (
    DatasetConfig,
    ExportConfig,
    FoldConfig,
    Fp32Config,
    LayerOverride,
    ModelConfig,
    QuantConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "ActQuant",
    "Config",
    "DatasetConfig",
    "Device",
    "ExportConfig",
    "ExportFormat",
    "FoldConfig",
    "FoldMode",
    "Fp32Config",
    "LayerOverride",
    "MemoryFormat",
    "ModelConfig",
    "Optimizer",
    "Oscillation",
    "Precision",
    "QatBn",
    "QatConfig",
    "QatPrepare",
    "QatValidate",
    "QuantConfig",
    "RangeEstimator",
    "Recalibrate",
    "ReestConfig",
    "ReestImages",
    "ReestMethod",
    "RuntimeConfig",
    "Schedule",
    "StoreConfig",
    "StoreMode",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "WeightGrid",
    "flatten",
]
