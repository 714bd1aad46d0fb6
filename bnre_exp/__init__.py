"""Batch-norm re-estimation after quantization: simulate, re-estimate, fold, and prove that it helps."""

from importlib.metadata import PackageNotFoundError, version

from bnre_exp.algorithms.bias import quantize_biases
from bnre_exp.algorithms.calibrate import calibrate
from bnre_exp.algorithms.evaluate import evaluate
from bnre_exp.algorithms.fold import fold_batch_norms
from bnre_exp.algorithms.integers import integer_simulation
from bnre_exp.algorithms.reestimate import reestimate_bn_stats
from bnre_exp.algorithms.train import train
from bnre_exp.errors import TrainingDivergedError, UserError
from bnre_exp.export.checkpoint.save_load import load_folded, save_folded
from bnre_exp.export.encodings import export_encodings
from bnre_exp.export.onnx.model import export_onnx
from bnre_exp.quantsim.insert import quantize
from bnre_exp.quantsim.listing import LayerRow, list_layers
from bnre_exp.quantsim.quantizers.scheme import LayerRule, QuantScheme
from bnre_exp.quantsim.sim import activation_quantizers, bypassed, sim_report, weight_quantizers

try:
    __version__ = version("bnre_exp")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"

__all__ = [
    "LayerRow",
    "LayerRule",
    "QuantScheme",
    "TrainingDivergedError",
    "UserError",
    "__version__",
    "activation_quantizers",
    "bypassed",
    "calibrate",
    "evaluate",
    "export_encodings",
    "export_onnx",
    "fold_batch_norms",
    "integer_simulation",
    "list_layers",
    "load_folded",
    "quantize",
    "quantize_biases",
    "reestimate_bn_stats",
    "save_folded",
    "sim_report",
    "train",
    "weight_quantizers",
]
