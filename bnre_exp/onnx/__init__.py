"""Batch norms of ONNX models: statistics re-estimated, or folded away, through ONNX Runtime."""

from bnre_exp.onnx.fold import fold_batch_norms
from bnre_exp.onnx.reestimate import reestimate_bn_stats
from bnre_exp.onnx_io.files import load_model, save_model

__all__ = ["fold_batch_norms", "load_model", "reestimate_bn_stats", "save_model"]
