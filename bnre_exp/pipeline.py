"""One job: which stage follows which, what each needs and reports."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from rich.console import Console
from safetensors.torch import save_model
from torch import fx, nn

from bnre_exp.config import ActQuant, Config, QatConfig, Recalibrate, TrainConfig, flatten
from bnre_exp.errors import UserError
from bnre_exp.export.checkpoint import load_folded, save_folded
from bnre_exp.job import Job, Results, leave_report, prepare, scheme, seed
from bnre_exp.models import BuiltModel
from bnre_exp.provenance import git_tags
from bnre_exp.quantsim.insert import activation_quantizers, bypassed, quantize, sim_report
from bnre_exp.quantsim.listing import list_layers
from bnre_exp.report.layers import layers_columns, layers_markdown
from bnre_exp.report.summary import Summary, print_summary
from bnre_exp.stages.bias import quantize_biases
from bnre_exp.stages.calibrate import calibrate
from bnre_exp.stages.compare import compare_logits
from bnre_exp.stages.evaluate import evaluate
from bnre_exp.stages.fold import fold_batch_norms
from bnre_exp.stages.reestimate import has_running_statistics, reestimate_bn_stats
from bnre_exp.stages.train import Epoch, train
from bnre_exp.tracking import open_run

LARGEST_FOLD_ERROR = 1e-2  # relative to the largest logit; float32 rounding stays far below, a wrong fold far above


def run(config: Config, *, run_dir: Path, overrides: Sequence[str] = (), console: Console) -> Results:
    """Run all stages of one job; everything it leaves is below ``run_dir`` and in MLflow.

    Raises ``UserError`` for a user's mistake, before training wherever it can be told before. What is finished by then
    stays: metrics in ``metrics.jsonl`` and MLflow, the trained network in ``fp32.safetensors``.
    """
    name = config.tracking.run_name or _run_name(config)
    code = git_tags(Path.cwd()) or git_tags(Path(__file__).parent)  # the user's project, else this package's checkout
    tags = {**code, "overrides": " ".join(overrides)}
    with open_run(
        run_dir,
        params=flatten(config),
        tags=tags,
        output_dir=Path(config.runtime.output_dir),
        experiment=config.tracking.experiment,
        run_name=name,
        uri=config.tracking.uri,
        enabled=config.tracking.enabled,
    ) as log:
        console.print(f"[bold]{name}[/bold]", highlight=False)
        job, built = prepare(config, run_dir, log, console, Summary(name))
        try:
            _run_stages(job, built)
        finally:
            leave_report(job)
    print_summary(job.results.summary, console)
    results = job.results
    del job, built
    gc.collect()  # graphs and parametrized layers are reference cycles; over a sweep they would pile up
    return results


def _run_name(config: Config) -> str:
    def bits(value: Optional[int]) -> str:
        return "fp" if value is None else str(value)

    model = config.model.name or config.model._target_.rpartition(".")[2]
    dataset = config.dataset._target_.rpartition(".")[2]
    scheme = f"w{bits(config.quant.weight_bits)}a{bits(config.quant.act_bits)}"
    scheme += "" if config.quant.per_channel else "-per-tensor"
    return f"{model}-{dataset}-{scheme}-{'qat' if config.qat.epochs else 'ptq'}-reest{config.reest.num_batches}"


def _run_stages(job: Job, built: BuiltModel) -> None:
    model = _fp32(job, built)
    sim = _quantize(job, model)
    if job.config.qat.epochs:
        _qat(job, sim)
    else:
        job.exceptions("note", [("QAT", "off (qat.epochs=0)")])
    if job.config.reest.num_batches:
        _reestimate(job, sim)
    else:
        job.exceptions("note", [("re-estimation", "off (reest.num_batches=0)")])
    folded = _fold(job, sim)
    _export(job, folded)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def _fp32(job: Job, built: BuiltModel) -> nn.Module:
    config, seconds, note = job.config, 0.0, "loaded"
    epochs = config.train.epochs
    if epochs is None:
        epochs = 0 if built.pretrained else config.dataset.train_epochs
    if epochs:
        seconds = _train(job, "fp32", built.module, epochs, config.train)
        note = f"trained for {epochs} epochs"
    elif not built.pretrained:
        note = "random weights: train.epochs=0 and nothing loaded"
    save_model(built.module, str(job.run_dir / "fp32.safetensors"))
    job.results.summary.places["FP32 weights"] = str(job.run_dir / "fp32.safetensors")
    evaluation = job.finish("fp32", "FP32", built.module, seconds, note=note)
    if evaluation.top1 < config.fp32.min_top1:
        raise UserError(
            f"fp32/top1={evaluation.top1:.4f} is below fp32.min_top1={config.fp32.min_top1}: this is not the network "
            "that was expected. Check model.weights or model.checkpoint, the preprocessing and the class order, "
            "or train longer."
        )
    return built.module


def _train(job: Job, stage: str, model: nn.Module, epochs: int, how: TrainConfig | QatConfig) -> float:
    def on_epoch(epoch: Epoch) -> None:
        values = {f"{stage}/train_loss": epoch.loss, f"{stage}/lr": epoch.lr, f"{stage}/epoch_seconds": epoch.seconds}
        if epoch.val_top1 is not None and epoch.val_loss is not None:
            values.update({f"{stage}/val_top1": epoch.val_top1, f"{stage}/val_loss": epoch.val_loss})
        job.metrics(values, step=epoch.epoch)
        if not job.console.is_terminal:  # there are no progress bars then
            score = "" if epoch.val_top1 is None else f", validation top-1 {epoch.val_top1:.4f}"
            line = f"  {stage} epoch {epoch.epoch}/{epochs}: loss {epoch.loss:.4f}{score}, {epoch.seconds:.1f} s"
            job.console.print(line, highlight=False)

    seed(job.config, stage)
    history = train(
        model, job.loaders.fresh("train"), epochs, lr=how.lr, optimizer=how.optimizer.value, momentum=how.momentum,
        weight_decay=how.weight_decay, schedule=how.schedule.value, label_smoothing=how.label_smoothing,
        precision=job.config.runtime.precision.value, validation=job.loaders.validation, on_epoch=on_epoch,
        progress=job.progress, description=f"{stage}: epoch",
    )  # fmt: skip
    return sum(epoch.seconds for epoch in history)


def _quantize(job: Job, model: nn.Module) -> fx.GraphModule:
    config = job.config
    example = job.loaders.example().to(job.device)

    def work() -> fx.GraphModule:
        sim = quantize(model, example, scheme(config), leaf_modules=config.model.leaf_modules)
        _calibrate(job, sim, "ptq")
        return sim

    sim, seconds = _timed(work)
    report = sim_report(sim)
    job.exceptions("not quantized", report.unquantized)
    job.exceptions("note", [("network", note) for note in report.notes])
    job.finish("ptq", "quantize + calibrate", sim, seconds, after="fp32")
    return sim  # type: ignore[no-any-return]


def _calibrate(job: Job, sim: fx.GraphModule, stage: str) -> None:
    def progress(iterable: Any, description: str, total: Optional[int] = None) -> Any:
        return job.progress(iterable, f"{stage}: {description}", total)

    calibrate(sim, job.loaders.fresh("calibration"), job.config.quant.calib_batches, progress=progress)


def _qat(job: Job, sim: fx.GraphModule) -> None:
    qat, has_ranges = job.config.qat, bool(activation_quantizers(sim))
    # Training normalizes each batch by itself; ranges found under statistics that no longer fit would start it with
    # dead activations (MobileNetV2's gradients overflowed that way at 2 bits).
    if has_ranges and has_running_statistics(sim):
        with bypassed(sim):
            reestimate_bn_stats(sim, job.loaders.fresh("calibration"), job.config.quant.calib_batches)
        _calibrate(job, sim, "qat")
    seconds = _train(job, "qat", sim, qat.epochs, qat)
    job.finish("qat", "QAT", sim, seconds, after="ptq", note=f"trained for {qat.epochs} epochs")


def _reestimate(job: Job, sim: fx.GraphModule) -> None:
    reest, has_qat = job.config.reest, job.config.qat.epochs > 0
    has_ranges = bool(activation_quantizers(sim))
    bypass = reest.act_quant is ActQuant.bypassed or (reest.act_quant is ActQuant.auto and not has_qat)
    again = reest.recalibrate is Recalibrate.always or (reest.recalibrate is Recalibrate.auto and not has_qat)
    again = again and has_ranges
    before = "qat" if has_qat else "ptq"
    if again:  # what the new ranges do on their own, so that the two effects are not mixed
        alone = copy.deepcopy(sim)
        _, seconds = _timed(lambda: _calibrate(job, alone, "recalibrate only"))
        job.finish(
            "recal_only", "recalibrate only", alone, seconds, after=before, note="for comparison, then discarded"
        )
        before = "recal_only"

    def work() -> Any:
        with bypassed(sim, activations=bypass):
            return reestimate_bn_stats(
                sim, job.loaders.fresh("reestimation"), reest.num_batches, method=reest.method.value,
                momentum=reest.momentum, progress=job.progress,
            )  # fmt: skip

    handle, seconds = _timed(work)
    if again:
        _, calibration_seconds = _timed(lambda: _calibrate(job, sim, "recalibrate"))
        job.metrics({"recalibrate/seconds": calibration_seconds})
    passes = "1 pass" if handle.passes == 1 else f"{handle.passes} passes"
    note = f"{handle.num_batches} batches, {passes}" + (", then recalibrated" if again else "")
    evaluation = job.finish("reest", "re-estimate BN", sim, seconds, after=before, note=note, passes=handle.passes)
    job.metrics({"reest/delta_top1": evaluation.top1 - job.evaluations[before].top1})
    job.exceptions("not re-estimated", [(name, "has no running statistics") for name in handle.without_statistics])
    job.exceptions("not re-estimated", [(name, "FrozenBatchNorm2d: constants") for name in handle.frozen])


def _fold(job: Job, sim: fx.GraphModule) -> fx.GraphModule:
    config, before = job.config, list(job.evaluations)[-1]
    _list_layers(job, sim)
    (folded, report), seconds = _timed(lambda: fold_batch_norms(sim, mode=config.fold.mode.value))
    job.exceptions("BN not folded", report.kept)
    job.exceptions("folded with loss", report.lossy)
    difference = compare_logits(sim, folded, job.loaders.test, progress=job.progress)
    exact = not report.lossy
    if exact and not difference.relative <= LARGEST_FOLD_ERROR:
        raise RuntimeError(
            f"Folding changed the network: its logits differ by {difference.relative:.2e} of the largest. This is a "
            "defect of bnre_exp; please report it with the network and the configuration."
        )
    unrounded = evaluate(folded, job.loaders.test, progress=job.progress, description="fold: evaluate")
    agreement = float((unrounded.predictions == job.evaluations[before].predictions).double().mean())
    metrics = {
        "max_abs_logit_diff": difference.largest,
        "max_rel_logit_diff": difference.relative,
        "top1_agreement": agreement,
        "folded_bns": len(report.folded),
        "kept_bns": len(report.kept),
    }
    if config.fold.bias_bits is not None:
        biases = quantize_biases(folded, config.fold.bias_bits)
        job.exceptions("bias not rounded", biases.kept)
        job.exceptions(
            "note",
            [(name, f"weight scale of {n} channels raised so that the bias fits") for name, n in biases.rescaled],
        )
    note = f"{len(report.folded)} BNs folded, {len(report.kept)} not; logits differ by {difference.relative:.0e}"
    rounded = job.finish("fold", "fold", folded, seconds, after=before, note=note, **metrics)
    if config.fold.bias_bits is not None:
        job.metrics({"fold/bias_delta_top1": rounded.top1 - unrounded.top1})
    return folded  # type: ignore[no-any-return]


def _list_layers(job: Job, sim: fx.GraphModule) -> None:
    """Where quantizers are, with which ranges, and which BN is folded where, before they are folded."""
    rows = list_layers(sim)
    path = job.run_dir / "layers.md"
    path.write_text(layers_markdown(job.results.summary.title, rows))
    job.log.artifact(path)
    job.log.table("layers.json", layers_columns(rows))
    job.results.summary.places["layer by layer"] = str(path)


def _export(job: Job, folded: fx.GraphModule) -> None:
    path = job.run_dir / "folded"
    foreign, seconds = _timed(lambda: save_folded(folded, path))
    job.results.folded = path
    job.results.summary.places["folded checkpoint"] = str(path)
    job.exceptions(
        "note", [(name, "outside the checkpoint's allow-list; load_folded needs model=") for name in foreign]
    )
    loaded = load_folded(path, model=folded if foreign else None).to(job.device)
    evaluation = job.finish("export", "export, loaded again", loaded, seconds, after="fold")
    if not torch.equal(evaluation.predictions, job.evaluations["fold"].predictions):
        raise RuntimeError("The exported checkpoint, loaded again, predicts differently. This is a defect of bnre_exp.")
    megabytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
    job.metrics({"export/megabytes": megabytes})
    final = {name: value for name, value in job.results.metrics.items() if name.endswith("/top1")}
    job.log.checkpoint(path, _run_name(job.config), flatten(job.config), final)
