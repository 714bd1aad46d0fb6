"""The folded network as files, each loaded again in another process and evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnre_exp.algorithms.feeding import evaluation_mode
from bnre_exp.config import ExportConfig, ExportFormat, flatten
from bnre_exp.data.preprocess import METADATA
from bnre_exp.errors import UserError
from bnre_exp.export.checkpoint.save_load import save_folded
from bnre_exp.export.encodings import MODEL, VERSIONS, write_encodings
from bnre_exp.export.onnx.model import check_exportable, write_model, write_qdq
from bnre_exp.export.onnx.plain import plain_network
from bnre_exp.export.onnx.records import Plain
from bnre_exp.files import work_folder
from bnre_exp.jobs.reporting import Job
from bnre_exp.jobs.stages.given import Given
from bnre_exp.jobs.stages.network import Result
from bnre_exp.jobs.stages.outcome import Measured, Outcome
from bnre_exp.jobs.stages.reload import Verifier
from bnre_exp.jobs.stages.setting import Setting, run_name, seed, timed
from bnre_exp.quantsim.nodes import is_layer
from bnre_exp.quantsim.operations import input_quantizer
from bnre_exp.tasks.task import Evaluation

WITHOUT_ONNX = " Or leave ONNX out: export.formats=[checkpoint]."
# What each format leaves in the run's folder.
FILES = {
    ExportFormat.checkpoint: "folded",
    ExportFormat.onnx: "model.onnx",
    ExportFormat.encodings: "encodings",
}


def export(setting: Setting, given: Given) -> tuple[Outcome, nn.Module]:
    """Write the formats that the configuration asks for, and compare what they predict with the folded simulation.

    Files that an earlier run left in the run's folder go. Raises ``UserError`` if a network cannot be written in a
    format, or a file fails its verification.
    """
    outcome, how, folder, advice = Outcome(), setting.config.export, given.run_dir, ""
    checkpoint, plain = folder / FILES[ExportFormat.checkpoint], None
    network: Any = given.network
    seed(setting.config, "export")
    for name in FILES.values():
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
    try:
        with Verifier(setting, _output_of(setting, network)) as verifier, work_folder() as scratch:
            if ExportFormat.checkpoint in how.formats:
                saved = timed(lambda: save_folded(network, checkpoint))
            if {ExportFormat.onnx, ExportFormat.encodings} & set(how.formats):  # while the verifier's process starts
                advice = WITHOUT_ONNX
                plain = timed(lambda: plain_network(network, setting.loaders.example(), how.opset))
            if ExportFormat.checkpoint in how.formats:
                advice = ""
                _checkpoint(setting, checkpoint, saved, verifier, outcome)
            if plain is not None:
                advice = WITHOUT_ONNX
                _onnx(setting, network, plain, folder, scratch, verifier, outcome)
    except UserError as error:
        raise UserError(f"export: {str(error).rstrip('.')}.{advice}") from error
    outcome.files = [FILES[kind] for kind in FILES if kind in how.formats]
    return outcome, network


def _output_of(setting: Setting, network: Any) -> Any:
    with evaluation_mode(network), torch.no_grad():
        return network(setting.example())


def _checkpoint(
    setting: Setting, path: Path, saved: tuple[Any, float], verifier: Verifier, outcome: Outcome
) -> None:  # fmt: skip
    foreign, seconds = saved
    outcome.except_for("note", [(name, "not in the checkpoint; load_folded needs model=") for name in foreign])
    file: dict[str, Any] = {"format": "checkpoint", "path": str(path), "device": str(setting.device)}
    if foreign:
        file["model"] = _builder(setting)
    evaluation, _ = verifier.evaluate(file, "checkpoint")
    if _agreement(setting, evaluation) < 1:
        _refuse("checkpoint", _agreement(setting, evaluation), "all of them")
    megabytes = sum(item.stat().st_size for item in path.rglob("*") if item.is_file()) / 1e6
    fp32 = sum(x.numel() * x.element_size() for x in setting.built.module.state_dict().values()) / 1e6
    metrics = {"megabytes": megabytes, "size_vs_fp32": megabytes / fp32}
    note = f"{megabytes:.2f} MB, FP32 {fp32:.2f}"
    outcome.measured.append(Measured("export", "checkpoint, loaded again", evaluation, seconds, "fold", note, metrics))


def _onnx(
    setting: Setting, network: Any, exported: tuple[Plain, float], folder: Path, scratch: Path, verifier: Verifier,
    outcome: Outcome,
) -> None:  # fmt: skip
    how, (plain, plain_seconds) = setting.config.export, exported
    plain.model.metadata_props[METADATA] = json.dumps(setting.loaders.preprocessing.describe())
    outcome.except_for("note", _float_weights(network, plain))
    if ExportFormat.encodings in how.formats:
        path = folder / FILES[ExportFormat.encodings]
        _, seconds = timed(lambda: write_encodings(plain, path))
        for version in VERSIONS:
            file = {"format": "encodings", "path": str(path), "version": version}
            evaluation, _ = verifier.evaluate(file, f"encodings {version}")
            agreement = _check(setting, f"encodings {version}", evaluation)
        metrics, note = {_agreement_name(setting): agreement}, f"{MODEL} and encodings {', '.join(VERSIONS)}"
        outcome.measured.append(
            Measured("encodings", "encodings, simulated", evaluation, plain_seconds + seconds, "fold", note, metrics)
        )
    if ExportFormat.onnx in how.formats:
        reference, path = scratch / "float.onnx", folder / FILES[ExportFormat.onnx]
        write_model(plain.model, reference)
        _, seconds = timed(lambda: write_qdq(plain, path, how.int4))
        file = {"format": "onnx", "path": str(path), "float": str(reference)}
        evaluation, known = verifier.evaluate(file, "ONNX model")
        metrics = {_agreement_name(setting): _check(setting, "ONNX model", evaluation), **known}
        metrics["megabytes"] = path.stat().st_size / 1e6
        row = Measured(
            "onnx", "ONNX Runtime", evaluation, plain_seconds + seconds, "fold", _onnx_note(setting, metrics), metrics
        )
        outcome.measured.append(row)


def _float_weights(network: Any, plain: Plain) -> list[tuple[str, str]]:
    """Layers whose float weights ONNX Runtime quantizes by itself, since their activations are quantized."""
    layers = [str(node.target) for node in network.graph.nodes if is_layer(node) and input_quantizer(node) is not None]
    quantized = {codes.layer for codes in plain.parameters if codes.codes.ndim > 1}
    left = [name for name in dict.fromkeys(layers) if name not in quantized]
    reason = "ONNX Runtime may quantize its float weight by itself (disabled_optimizers=['WeightBiasQuantization'])"
    return [(name, reason) for name in left]


def _agreement_name(setting: Setting) -> str:
    return f"{setting.task.headline.name}_agreement"


def _onnx_note(setting: Setting, metrics: dict[str, float]) -> str:
    layers = metrics["integer_layers"] + metrics["float_layers"]
    return (
        f"agreement {metrics[_agreement_name(setting)]:.4f}; {metrics['milliseconds']:.2f} ms an image, FP32 "
        f"{metrics['fp32_milliseconds']:.2f}; {metrics['integer_layers']:.0f} of {layers:.0f} layers in integer kernels"
    )


def _builder(setting: Setting) -> dict[str, Any]:
    """Arguments of ``build_model`` that build the network without its weights."""
    model = setting.config.model
    return {
        "target": model._target_, "name": model.name, "path": model.path, "kwargs": model.kwargs,
        "num_classes": setting.config.dataset.num_classes,
    }  # fmt: skip


def _agreement(setting: Setting, evaluation: Evaluation) -> float:
    """The part of the test images for which a file predicts what the folded simulation does."""
    return setting.task.agreement(evaluation.predictions, setting.evaluations["fold"].predictions)


def _check(setting: Setting, what: str, evaluation: Evaluation) -> float:
    """The agreement, if it is enough; a single image may always differ, where few are tested."""
    agreement, least = _agreement(setting, evaluation), setting.config.export.min_agreement
    if agreement < least and (1 - agreement) * evaluation.count > 1.5:
        _refuse(what, agreement, f"export.min_agreement={least}")
    return agreement


def _refuse(what: str, agreement: float, expected: str) -> None:
    raise UserError(
        f"the {what} that was written, loaded in another process, agrees with the folded simulation on "
        f"{agreement:.4f} of the test images; expected {expected}. The file is kept to look at"
    )


def check_export(sim: nn.Module, how: ExportConfig, example: Any) -> None:
    """Raise ``UserError`` if a network that is quantized so cannot be written in the formats that are asked for."""
    if {ExportFormat.onnx, ExportFormat.encodings} & set(how.formats):
        try:
            check_exportable(sim, example, how.opset)
        except UserError as error:
            raise UserError(f"export: {str(error).rstrip('.')}.{WITHOUT_ONNX}") from error


def leave_exported(job: Job, result: Result) -> None:
    """Say where the files are, and list what is a model in MLflow."""
    name, places, values = run_name(job.config), job.results.summary.places, flatten(job.config)
    files = {kind: job.run_dir / FILES[kind] for kind in job.config.export.formats}
    ending = f"/{job.setting.task.headline.name}"
    final = {name: value for name, value in job.results.metrics.items() if name.endswith(ending)}
    if path := files.get(ExportFormat.checkpoint):
        job.results.folded = path
        places["folded checkpoint"] = str(path)
        job.log.model(path, name, "bnre_exp folded checkpoint", values, final)
    if path := files.get(ExportFormat.onnx):
        places["ONNX model"] = str(path)
        example = job.setting.loaders.example()[:1].contiguous().numpy()
        job.log.onnx_model(path, f"{name}-onnx", example, values, final)
    if path := files.get(ExportFormat.encodings):
        places["AIMET encodings"] = str(path)
        job.log.artifact(path)
