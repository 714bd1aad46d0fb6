"""Batch-norm re-estimation after quantization: simulate, re-estimate, fold, and prove that it helps.

The names are imported when they are first used (PEP 562), so that ``bnre-exp --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnre_exp.algorithms.bias import quantize_biases
    from bnre_exp.algorithms.calibrate import calibrate
    from bnre_exp.algorithms.evaluate import evaluate
    from bnre_exp.algorithms.fold import fold_batch_norms
    from bnre_exp.algorithms.integers import integer_simulation
    from bnre_exp.algorithms.oscillation import track_oscillations
    from bnre_exp.algorithms.reestimate import reestimate_bn_stats
    from bnre_exp.algorithms.significance import PairedTest, paired_test
    from bnre_exp.algorithms.train import train
    from bnre_exp.errors import TrainingDivergedError, UserError
    from bnre_exp.export.checkpoint.save_load import load_folded, save_folded
    from bnre_exp.export.encodings import export_encodings
    from bnre_exp.export.onnx.model import export_onnx
    from bnre_exp.quantsim.insert import quantize
    from bnre_exp.quantsim.listing import LayerRow, list_layers
    from bnre_exp.quantsim.quantizers.scheme import LayerRule, QuantScheme
    from bnre_exp.quantsim.sim import activation_quantizers, bypassed, sim_report, weight_quantizers

    __version__: str

__all__ = [
    "LayerRow",
    "LayerRule",
    "PairedTest",
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
    "paired_test",
    "quantize",
    "quantize_biases",
    "reestimate_bn_stats",
    "save_folded",
    "sim_report",
    "track_oscillations",
    "train",
    "weight_quantizers",
]

_PLACES = {
    "algorithms.bias": ["quantize_biases"],
    "algorithms.calibrate": ["calibrate"],
    "algorithms.evaluate": ["evaluate"],
    "algorithms.fold": ["fold_batch_norms"],
    "algorithms.integers": ["integer_simulation"],
    "algorithms.oscillation": ["track_oscillations"],
    "algorithms.reestimate": ["reestimate_bn_stats"],
    "algorithms.significance": ["PairedTest", "paired_test"],
    "algorithms.train": ["train"],
    "errors": ["TrainingDivergedError", "UserError"],
    "export.checkpoint.save_load": ["load_folded", "save_folded"],
    "export.encodings": ["export_encodings"],
    "export.onnx.model": ["export_onnx"],
    "quantsim.insert": ["quantize"],
    "quantsim.listing": ["LayerRow", "list_layers"],
    "quantsim.quantizers.scheme": ["LayerRule", "QuantScheme"],
    "quantsim.sim": ["activation_quantizers", "bypassed", "sim_report", "weight_quantizers"],
}
_PLACE_OF = {name: f"bnre_exp.{module}" for module, names in _PLACES.items() for name in names}
_ROOMS = {module.partition(".")[0] for module in _PLACES}

if not TYPE_CHECKING:  # a type checker that saw these would take any name for one that exists

    def __getattr__(name: str) -> object:
        if name == "__version__":
            value = _version()
        elif name in _PLACE_OF:
            value = getattr(import_module(_PLACE_OF[name]), name)
        elif name in _ROOMS:  # bnre_exp.quantsim after ``import bnre_exp``
            return import_module(f"bnre_exp.{name}")
        else:
            raise AttributeError(f"module 'bnre_exp' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bnre_exp")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
