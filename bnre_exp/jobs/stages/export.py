"""The folded network as files, each loaded again in another process and evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from bnre_exp.config import ExportConfig, ExportFormat, flatten
from bnre_exp.data.preprocess import CLASSES, METADATA
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
from bnre_exp.quantsim.parts import inputs_of_parts
from bnre_exp.quantsim.sim import graphs_of
from bnre_exp.quantsim.whole import named
from bnre_exp.tasks.task import Evaluation

WITHOUT_ONNX = " Or leave ONNX out: export.formats=[checkpoint]."
# What each format leaves in the run's folder.
FILES = {
    ExportFormat.checkpoint: "folded",
    ExportFormat.onnx: "model.onnx",
    ExportFormat.encodings: "encodings",
}
ONNX_OF_PARTS = "model"  # a folder, in place of FILES[ExportFormat.onnx], of a network that is simulated in parts


def export_settings(setting: Setting, own: dict[str, Any]) -> dict[str, Any]:
    """The names of the classes are in the files."""
    return {**own, "dataset.classes": setting.loaders.classes}


def export(setting: Setting, given: Given) -> tuple[Outcome, nn.Module]:
    """Write the formats that the configuration asks for, and compare what they predict with the folded simulation.

    Files that an earlier run left in the run's folder go. Raises ``UserError`` if a network cannot be written in a
    format, or a file fails its verification.
    """
    outcome, how, folder, advice = Outcome(), setting.config.export, given.run_dir, ""
    checkpoint, plain = folder / FILES[ExportFormat.checkpoint], None
    network: Any = given.network
    for graph in graphs_of(network).values():
        if setting.loaders.classes is not None:
            graph.meta["classes"] = setting.loaders.classes
    seed(setting.config, "export")
    for name in (*FILES.values(), ONNX_OF_PARTS):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
    try:
        with Verifier(setting, network) as verifier, work_folder() as scratch:
            if ExportFormat.checkpoint in how.formats:
                saved = timed(lambda: save_folded(network, checkpoint))
            if {ExportFormat.onnx, ExportFormat.encodings} & set(how.formats):  # while the verifier's process starts
                advice = WITHOUT_ONNX
                plain = timed(lambda: _plain_graphs(setting, network))
            if ExportFormat.checkpoint in how.formats:
                advice = ""
                _checkpoint(setting, network, checkpoint, saved, verifier, outcome)
            if plain is not None:
                advice = WITHOUT_ONNX
                _onnx(setting, network, plain, folder, scratch, verifier, outcome)
    except UserError as error:
        raise UserError(f"export: {str(error).rstrip('.')}.{advice}") from error
    outcome.files = [name for name in _left(network, how.formats) if (folder / name).exists()]
    return outcome, network


def _plain_graphs(setting: Setting, network: Any) -> dict[str, Plain]:
    """Each graph of the folded network, without its quantizers; the images' sizes are those of the data."""
    opset, example = setting.config.export.opset, setting.example()
    whole = isinstance(network, fx.GraphModule)
    inputs = {"": (example,)} if whole else inputs_of_parts(network, example)
    plain = {part: plain_network(graph, inputs[part], opset) for part, graph in graphs_of(network).items()}
    for part in plain.values():
        part.model.metadata_props[METADATA] = json.dumps(setting.loaders.preprocessing.describe())
        if setting.loaders.classes is not None:
            part.model.metadata_props[CLASSES] = json.dumps(list(setting.loaders.classes))
    return plain


def _checkpoint(
    setting: Setting, network: Any, path: Path, saved: tuple[Any, float], verifier: Verifier, outcome: Outcome
) -> None:  # fmt: skip
    foreign, seconds = saved
    outcome.except_for("note", [(name, "not in the checkpoint; load_folded needs model=") for name in foreign])
    built = {"model": _builder(setting)} if foreign else {}
    common: dict[str, Any] = {"format": "checkpoint", "device": str(setting.device), **built}
    files = {part: {**common, "path": str(path / part), "part": part} for part in graphs_of(network)}
    evaluation, _ = verifier.evaluate(files, "checkpoint")
    is_same = torch.equal(evaluation.predictions, setting.evaluations["fold"].predictions)
    if not is_same and _agreement(setting, evaluation) < 1:
        _refuse("checkpoint", _agreement(setting, evaluation), "all of them")
    megabytes = sum(item.stat().st_size for item in path.rglob("*") if item.is_file()) / 1e6
    fp32 = sum(x.numel() * x.element_size() for x in setting.built.module.state_dict().values()) / 1e6
    metrics = {"megabytes": megabytes, "size_vs_fp32": megabytes / fp32}
    note = f"{megabytes:.2f} MB, FP32 {fp32:.2f}"
    outcome.measured.append(Measured("export", "checkpoint, loaded again", evaluation, seconds, "fold", note, metrics))


def _onnx(
    setting: Setting, network: Any, exported: tuple[dict[str, Plain], float], folder: Path, scratch: Path,
    verifier: Verifier, outcome: Outcome,
) -> None:  # fmt: skip
    how, (graphs, plain_seconds) = setting.config.export, exported
    for part, graph in graphs_of(network).items():
        rows = _float_weights(graph, graphs[part])
        outcome.except_for("note", [(named(part, name), reason) for name, reason in rows])
    if ExportFormat.encodings in how.formats:
        path = folder / FILES[ExportFormat.encodings]
        _, seconds = timed(lambda: _each(graphs, lambda part, plain: write_encodings(plain, path / part)))
        for version in VERSIONS:
            files = {p: {"format": "encodings", "path": str(path / p), "version": version} for p in graphs}
            evaluation, _ = verifier.evaluate(files, f"encodings {version}")
            agreement = _check(setting, f"encodings {version}", evaluation)
        metrics, note = {_agreement_name(setting): agreement}, f"{MODEL} and encodings {', '.join(VERSIONS)}"
        outcome.measured.append(
            Measured("encodings", "encodings, simulated", evaluation, plain_seconds + seconds, "fold", note, metrics)
        )
    if ExportFormat.onnx in how.formats:
        files = {}
        for part, plain in graphs.items():
            path, reference = _onnx_file(folder, part), scratch / f"{part}float.onnx"
            files[part] = {"format": "onnx", "path": str(path), "float": str(reference)}
            write_model(plain.model, reference)
        _, seconds = timed(
            lambda: _each(graphs, lambda part, plain: write_qdq(plain, Path(files[part]["path"]), how.int4))
        )
        evaluation, known = verifier.evaluate(files, "ONNX model")
        metrics = {_agreement_name(setting): _check(setting, "ONNX model", evaluation), **known}
        metrics["megabytes"] = sum(Path(file["path"]).stat().st_size for file in files.values()) / 1e6
        row = Measured(
            "onnx", "ONNX Runtime", evaluation, plain_seconds + seconds, "fold", _onnx_note(setting, metrics), metrics
        )
        outcome.measured.append(row)


def _each(graphs: Mapping[str, Plain], write: Callable[[str, Plain], None]) -> None:
    for part, plain in graphs.items():
        write(part, plain)


def _onnx_file(folder: Path, part: str) -> Path:
    """Where the ONNX model of a network is, or of a part of it, which has a folder with the others."""
    return folder / ONNX_OF_PARTS / f"{part}.onnx" if part else folder / FILES[ExportFormat.onnx]


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
        f"the {what} that was written, loaded in another process, agrees with the folded simulation in "
        f"{agreement:.4f} of what it predicts for the test images; expected {expected}. The file is kept to look at"
    )


def check_export(sim: nn.Module, how: ExportConfig, example: Any) -> None:
    """Raise ``UserError`` if a network that is quantized so cannot be written in the formats that are asked for."""
    if {ExportFormat.onnx, ExportFormat.encodings} & set(how.formats):
        try:
            check_exportable(sim, example, how.opset)
        except UserError as error:
            raise UserError(f"export: {str(error).rstrip('.')}.{WITHOUT_ONNX}") from error


def _left(network: Any, formats: Sequence[ExportFormat]) -> list[str]:
    names = {kind: name for kind, name in FILES.items() if kind in formats}
    if ExportFormat.onnx in names and not isinstance(network, fx.GraphModule):
        names[ExportFormat.onnx] = ONNX_OF_PARTS
    return list(names.values())


def leave_exported(job: Job, result: Result) -> None:
    """Say where the files are, and list what is a model in MLflow."""
    name, places, values = run_name(job.config), job.results.summary.places, flatten(job.config)
    files = {kind: job.run_dir / FILES[kind] for kind in job.config.export.formats}
    in_parts = bool(job.config.model.submodules)
    ending = f"/{job.setting.task.headline.name}"
    final = {name: value for name, value in job.results.metrics.items() if name.endswith(ending)}
    if path := files.get(ExportFormat.checkpoint):
        job.results.folded = path
        places["folded checkpoint"] = str(path)
        if in_parts:  # loading it takes the network, which MLflow does not have
            job.log.artifact(path)
        else:
            job.log.model(path, name, "bnre_exp folded checkpoint", values, final)
    if in_parts and ExportFormat.onnx in files:
        places["ONNX models of the parts"] = str(job.run_dir / ONNX_OF_PARTS)
        job.log.artifact(job.run_dir / ONNX_OF_PARTS)
    elif path := files.get(ExportFormat.onnx):
        places["ONNX model"] = str(path)
        example = job.setting.loaders.example()[:1].contiguous().numpy()
        job.log.onnx_model(path, f"{name}-onnx", example, values, final)
    if path := files.get(ExportFormat.encodings):
        places["AIMET encodings"] = str(path)
        job.log.artifact(path)
