"""The stages of a job, in order: the one table that planning, running, reporting, the store and comparisons read."""

from __future__ import annotations

from bnre_exp.config import Config, ExportFormat, QatPrepare
from bnre_exp.jobs.stages.export import export, export_settings, leave_exported
from bnre_exp.jobs.stages.fold import FOLDED, fold
from bnre_exp.jobs.stages.fp32 import fp32, fp32_settings, leave_fp32
from bnre_exp.jobs.stages.network import FLOAT, SAME
from bnre_exp.jobs.stages.ptq import ptq, ptq_settings
from bnre_exp.jobs.stages.qat import qat, qat_settings
from bnre_exp.jobs.stages.qat_start import prepare_of, qat_start, qat_start_settings
from bnre_exp.jobs.stages.reest import reest, reest_settings
from bnre_exp.jobs.stages.reest_only import reest_only, reest_only_settings
from bnre_exp.jobs.stages.simulation import SIM
from bnre_exp.jobs.stages.stage import Stage, Uses

# What every stage does: take up the network before it, measure, and keep what it measured.
MEASURING = (
    "tasks", "algorithms.evaluate", "algorithms.feeding", "jobs.stages.setting", "jobs.stages.network",
    "jobs.stages.outcome", "algorithms.snapshot", "algorithms.speed", "quantsim.whole",
)  # fmt: skip
TRAINING = (
    "jobs.stages.training",
    "algorithms.train",
    "algorithms.batch_loss",
    "algorithms.control",
    "algorithms.averaging",
    "algorithms.epoch",
    "algorithms.recipe",
    "quantsim.tracing.frozen",
    "quantsim.wrappers",
)
SIMULATION = ("quantsim", "jobs.stages.simulation")
CALIBRATION = ("jobs.stages.calibration", "algorithms.calibrate")
RE_ESTIMATION = (
    "algorithms.ablation", "algorithms.drift",
    "algorithms.reestimate", "algorithms.recorder", "algorithms.bn_statistics", "algorithms.sampling",
    "algorithms.observed", "algorithms.unchanged",
)  # fmt: skip
FOLDING = ("algorithms.fold", "algorithms.bias", "algorithms.integers")
ONNX = ("onnx", "onnx-ir", "onnxscript", "onnxruntime")


def _export_uses(config: Config) -> Uses:
    """Files of ONNX are written and run by other libraries than checkpoints."""
    code = ["jobs.stages.export", "jobs.stages.reload", "jobs.stages.reload_process", "export.folded"]
    libraries: list[str] = []
    formats = set(config.export.formats)
    if ExportFormat.checkpoint in formats:
        code += ["export.checkpoint", "models.build"]
        libraries += ["safetensors"]
    if formats & {ExportFormat.onnx, ExportFormat.encodings}:
        code += ["export.onnx", "onnx_io"]
        libraries += ONNX
    if ExportFormat.encodings in formats:
        code += ["export.encodings"]
    return Uses((*code, *FOLDING, *SIMULATION, *MEASURING), tuple(libraries))


STAGES = (
    Stage(
        "fp32", section="train", settings=fp32_settings, run=fp32, follows=(), form=FLOAT, leave=leave_fp32,
        uses=lambda config: Uses(("jobs.stages.fp32", *TRAINING, *MEASURING)),
        rows={"fp32": "FP32"},
    ),
    Stage(
        "ptq", section="quant", settings=ptq_settings, run=ptq, follows=("fp32",), form=SIM,
        uses=lambda config: Uses(("jobs.stages.ptq", *SIMULATION, *CALIBRATION, *MEASURING)),
        rows={"ptq": "quantized"},
    ),
    Stage(
        "reest_only", section="reest", settings=reest_only_settings, run=reest_only, follows=("ptq",), form=SAME,
        is_on=lambda config: config.qat.epochs > 0 and config.reest.num_batches > 0,
        uses=lambda config: Uses(
            ("jobs.stages.reest_only", "jobs.stages.reest", *SIMULATION, *CALIBRATION, *RE_ESTIMATION, *MEASURING)
        ),
        rows={"reest_only": "re-estimated, not trained"},
    ),
    Stage(
        "qat_start", section="qat", settings=qat_start_settings, run=qat_start, follows=("ptq",), form=SIM,
        is_on=lambda config: config.qat.epochs > 0 and prepare_of(config) is not QatPrepare.none,
        uses=lambda config: Uses(("jobs.stages.qat_start", *SIMULATION, *CALIBRATION, *RE_ESTIMATION, *MEASURING)),
        rows={"qat_start": "start of QAT"},
    ),
    Stage(
        "qat", section="qat", settings=qat_settings, run=qat, follows=("qat_start", "ptq"), form=SIM,
        is_on=lambda config: config.qat.epochs > 0, off=("QAT", "off (qat.epochs=0)"),
        uses=lambda config: Uses(
            ("jobs.stages.qat", "algorithms.oscillation", *TRAINING, *RE_ESTIMATION, *SIMULATION, *MEASURING)
        ),
        rows={"qat": "QAT"},
    ),
    Stage(
        "reest", section="reest", settings=reest_settings, run=reest, follows=("qat", "ptq"), form=SIM,
        is_on=lambda config: config.reest.num_batches > 0, off=("re-estimation", "off (reest.num_batches=0)"),
        uses=lambda config: Uses(("jobs.stages.reest", *SIMULATION, *CALIBRATION, *RE_ESTIMATION, *MEASURING)),
        rows={"recal_only": "recalibrated", "reest": "re-estimated"},
    ),
    Stage(
        "fold", section="fold", run=fold, follows=("reest", "qat", "ptq"), form=FOLDED,
        uses=lambda config: Uses(
            (
                "jobs.stages.fold", "algorithms.fold_loss", "algorithms.compare", "algorithms.size", *FOLDING,
                *SIMULATION, *MEASURING,
            )
        ),
        rows={"fold": "folded"},
    ),
    Stage(
        "export", section="export", settings=export_settings, run=export, follows=("fold",), form=SAME,
        is_on=lambda config: bool(config.export.formats), off=("export", "off (export.formats=[])"),
        leave=leave_exported, uses=_export_uses, rows={},
    ),
)  # fmt: skip

# The heading of every row that stages measure, by the name that metrics have, in the order of a comparison's columns:
# what re-estimation starts from stands before it.
COMPARED = ("fp32", "ptq", "recal_only", "reest_only", "qat_start", "qat", "reest", "fold")
_HEADINGS = {row: heading for stage in STAGES for row, heading in stage.rows.items()}
HEADINGS = {row: _HEADINGS[row] for row in COMPARED}


def stages_of(config: Config) -> list[Stage]:
    """The stages that are on, in order."""
    return [stage for stage in STAGES if stage.is_on(config)]
