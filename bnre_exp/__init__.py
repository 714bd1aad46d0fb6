"""Batch-norm re-estimation after quantization: simulate, re-estimate, fold, and prove that it helps."""

from bnre_exp.errors import TrainingDivergedError, UserError
from bnre_exp.export.checkpoint import load_folded, save_folded
from bnre_exp.export.encodings import export_encodings
from bnre_exp.export.onnx import export_onnx
from bnre_exp.quantsim.insert import (
    activation_quantizers,
    bypassed,
    quantize,
    sim_report,
    weight_quantizers,
)
from bnre_exp.quantsim.listing import LayerRow, list_layers
from bnre_exp.quantsim.scheme import LayerRule, QuantScheme
from bnre_exp.stages.bias import quantize_biases
from bnre_exp.stages.calibrate import calibrate
from bnre_exp.stages.evaluate import evaluate
from bnre_exp.stages.fold import fold_batch_norms
from bnre_exp.stages.integers import integer_simulation
from bnre_exp.stages.reestimate import reestimate_bn_stats
from bnre_exp.stages.train import train

__all__ = [
    "LayerRow",
    "LayerRule",
    "QuantScheme",
    "TrainingDivergedError",
    "UserError",
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
