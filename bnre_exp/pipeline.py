"""One job: which stage follows which, what each needs and reports."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_model
from torch import fx, nn

from bnre_exp.config import ActQuant, Config, Device, FoldMode, MemoryFormat, QatConfig, Recalibrate, TrainConfig, flatten
from bnre_exp.data import Loaders, Preprocessing, build_loaders, check_labels, resolve_preprocessing
from bnre_exp.errors import UserError
from bnre_exp.export.checkpoint import load_folded, save_folded
from bnre_exp.models import BuiltModel, build_model, check_head
from bnre_exp.quantsim.insert import activation_quantizers, bypassed, quantize, sim_report
from bnre_exp.quantsim.scheme import LayerRule, QuantScheme
from bnre_exp.report.console import ConsoleProgress
from bnre_exp.report.summary import StageResult, Summary, markdown, print_summary
from bnre_exp.splits import stream_seed
from bnre_exp.stages.bias import quantize_biases
from bnre_exp.stages.calibrate import calibrate
from bnre_exp.stages.compare import compare_logits
from bnre_exp.stages.evaluate import Evaluation, evaluate
from bnre_exp.stages.fold import FoldReport, fold_batch_norms
from bnre_exp.stages.reestimate import reestimate_bn_stats
from bnre_exp.stages.train import Epoch, train
from bnre_exp.tracking import RunLog, compare_link, git_tags, open_run, ui_command

LARGEST_FOLD_ERROR = 1e-2  # relative to the largest logit; float32 rounding stays far below, a wrong fold far above
DEFAULT_THREADS = torch.get_num_threads()  # of the process, before a job changes it

logger = logging.getLogger(__name__)


@dataclass
class Results:
    """What a job measured. metrics: by MLflow name; summary: the table; folded: the checkpoint's folder."""

    metrics: dict[str, float]
    summary: Summary
    folded: Optional[Path] = None


@dataclass
class _Job:
    config: Config
    run_dir: Path
    log: RunLog
    console: Console
    progress: ConsoleProgress
    device: torch.device
    loaders: Loaders
    results: Results
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    def finish(
        self, stage: str, label: str, model: nn.Module, seconds: float, *, after: Optional[str] = None, note: str = "",
        **metrics: float,
    ) -> Evaluation:  # fmt: skip
        """Evaluate a stage's network on the test data, log it, and add its row; ``after`` is the stage to compare with."""
        evaluation = evaluate(model, self.loaders.test, progress=self.progress, description=f"{stage}: evaluate")
        self.evaluations[stage] = evaluation
        before = self.evaluations[after].top1 if after else None
        delta = None if before is None else evaluation.top1 - before
        row = StageResult(label, evaluation.top1, delta, evaluation.loss, seconds, note)
        self.results.summary.stages.append(row)
        self.metrics({f"{stage}/top1": evaluation.top1, f"{stage}/loss": evaluation.loss, f"{stage}/seconds": seconds})
        self.metrics({f"{stage}/{name}": value for name, value in metrics.items()})
        change = "" if delta is None else f" ({delta:+.4f})"
        self.console.print(f"  {label}: top-1 {evaluation.top1:.4f}{change}, {seconds:.1f} s", highlight=False)
        return evaluation

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        if values:
            self.log.metrics(values, step)
            self.results.metrics.update(values)

    def exceptions(self, heading: str, rows: Sequence[tuple[str, str]]) -> None:
        self.results.summary.exceptions.setdefault(heading, []).extend(rows)


def run(config: Config, *, run_dir: Path, overrides: Sequence[str] = (), console: Console) -> Results:
    """Run all stages of one job; everything it leaves is below ``run_dir`` and in MLflow.

    Raises ``UserError`` for a user's mistake, before training wherever it can be told before. What is finished by then
    stays: metrics in ``metrics.jsonl`` and MLflow, the trained network in ``fp32.safetensors``.
    """
    name = config.tracking.run_name or _run_name(config)
    tags = {**git_tags(Path.cwd()), "overrides": " ".join(overrides)}
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
        job, built = _prepare(config, run_dir, log, console, Summary(name))
        try:
            _run_stages(job, built)
        finally:
            _leave_report(job)
    print_summary(job.results.summary, console)
    return job.results


def _run_name(config: Config) -> str:
    def bits(value: Optional[int]) -> str:
        return "fp" if value is None else str(value)

    model = config.model.name or config.model._target_.rpartition(".")[2]
    dataset = config.dataset._target_.rpartition(".")[2]
    scheme = f"w{bits(config.quant.weight_bits)}a{bits(config.quant.act_bits)}"
    scheme += "" if config.quant.per_channel else "-per-tensor"
    return f"{model}-{dataset}-{scheme}-{'qat' if config.qat.epochs else 'ptq'}-reest{config.reest.num_batches}"


def _seed(config: Config, purpose: str) -> None:
    """Everything random from here on depends on the seed and the purpose, not on what ran before."""
    seed = stream_seed(config.seed, purpose)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _prepare(
    config: Config, run_dir: Path, log: RunLog, console: Console, summary: Summary
) -> tuple[_Job, BuiltModel]:
    """Data and network, and every check that needs no training."""
    torch.set_num_threads(config.runtime.threads or DEFAULT_THREADS)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    device = _device(config.runtime.device)
    model, data = config.model, config.dataset
    _seed(config, "model")
    built = build_model(
        model._target_, name=model.name, kwargs=model.kwargs, num_classes=data.num_classes, weights=model.weights,
        checkpoint=model.checkpoint, strip_prefixes=model.strip_prefixes, strict=model.strict,
        replace_head=model.replace_head,
    )  # fmt: skip
    preprocessing = resolve_preprocessing(
        built.preprocessing, image_size=data.image_size, mean=data.mean, std=data.std,
        default_image_size=data.default_image_size, default_mean=data.default_mean, default_std=data.default_std,
    )  # fmt: skip
    progress = ConsoleProgress(console)
    loaders = build_loaders(
        data._target_, root=data.root, kwargs=data.kwargs, preprocessing=preprocessing, seed=config.seed,
        batch_size=data.batch_size, eval_batch_size=data.eval_batch_size, val_fraction=data.val_fraction,
        train_limit=data.train_limit, test_limit=data.test_limit, in_memory=data.in_memory, augment=data.augment,
        workers=config.runtime.workers, pin_memory=device.type == "cuda", progress=progress,
    )  # fmt: skip
    check_labels(loaders, data.num_classes)
    example = loaders.example()
    check_head(built.module, example, data.num_classes)
    quantize(built.module, example, _scheme(config), leaf_modules=model.leaf_modules)  # only to fail before training
    has_3d = any(p.dim() == 5 for p in built.module.parameters())
    channels_last = config.runtime.memory_format is MemoryFormat.channels_last and not has_3d
    built.module.to(device=device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    _log_inputs(log, config, loaders, preprocessing)
    job = _Job(config, run_dir, log, console, progress, device, loaders, Results({}, summary))
    job.exceptions("note", [("model", note) for note in built.notes])
    return job, built


def _device(wanted: Device) -> torch.device:
    if wanted is Device.cuda and not torch.cuda.is_available():
        raise UserError("runtime.device=cuda: torch sees no CUDA device here; use runtime.device=cpu or auto.")
    use_cuda = wanted is not Device.cpu and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def _scheme(config: Config) -> QuantScheme:
    quant = config.quant
    rules = tuple(LayerRule(o.pattern, o.weight_bits, o.act_bits, o.off) for o in quant.overrides)
    return QuantScheme(
        weight_bits=quant.weight_bits, act_bits=quant.act_bits, per_channel=quant.per_channel,
        range_learning=quant.range_learning, first_last_bits=quant.first_last_bits, overrides=rules,
        weight_range=quant.weight_range.value, act_range=quant.act_range.value, percentile=quant.percentile,
    )  # fmt: skip


def _log_inputs(log: RunLog, config: Config, loaders: Loaders, preprocessing: Preprocessing) -> None:
    log.tag("preprocessing", json.dumps(preprocessing.describe()))
    target = config.dataset._target_
    for role in loaders.indices:
        split = "test" if role == "test" else "train"
        profile = {"images": len(loaders.indices[role]), **preprocessing.describe()}
        name = target.rpartition(".")[2]
        log.dataset(name, loaders.digests[split], config.dataset.root or target, role, profile)


def _run_stages(job: _Job, built: BuiltModel) -> None:
    model = _fp32(job, built)
    sim = _quantize(job, model)
    if job.config.qat.epochs:
        _qat(job, sim)
    if job.config.reest.num_batches:
        _reestimate(job, sim)
    folded = _fold(job, sim)
    _export(job, folded)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def _fp32(job: _Job, built: BuiltModel) -> nn.Module:
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
            f"fp32/top1={evaluation.top1:.4f} is below fp32.min_top1={config.fp32.min_top1}: this is not the network that "
            "was expected. Check model.weights or model.checkpoint, the preprocessing and the class order, or train longer."
        )
    return built.module


def _train(job: _Job, stage: str, model: nn.Module, epochs: int, how: TrainConfig | QatConfig) -> float:
    def on_epoch(epoch: Epoch) -> None:
        values = {f"{stage}/train_loss": epoch.loss, f"{stage}/lr": epoch.lr, f"{stage}/epoch_seconds": epoch.seconds}
        if epoch.val_top1 is not None and epoch.val_loss is not None:
            values.update({f"{stage}/val_top1": epoch.val_top1, f"{stage}/val_loss": epoch.val_loss})
        job.metrics(values, step=epoch.epoch)

    _seed(job.config, stage)
    history = train(
        model, job.loaders.fresh("train"), epochs, lr=how.lr, optimizer=how.optimizer.value, momentum=how.momentum,
        weight_decay=how.weight_decay, schedule=how.schedule.value, label_smoothing=how.label_smoothing,
        precision=job.config.runtime.precision.value, validation=job.loaders.validation, on_epoch=on_epoch,
        progress=job.progress, description=f"{stage}: epoch",
    )  # fmt: skip
    return sum(epoch.seconds for epoch in history)


def _quantize(job: _Job, model: nn.Module) -> fx.GraphModule:
    config = job.config
    example = job.loaders.example().to(job.device)

    def work() -> fx.GraphModule:
        sim = quantize(model, example, _scheme(config), leaf_modules=config.model.leaf_modules)
        _calibrate(job, sim, "ptq")
        return sim

    sim, seconds = _timed(work)
    report = sim_report(sim)
    job.exceptions("not quantized", report.unquantized)
    job.exceptions("note", [("network", note) for note in report.notes])
    job.finish("ptq", "quantize + calibrate", sim, seconds, after="fp32")
    return sim  # type: ignore[no-any-return]


def _calibrate(job: _Job, sim: fx.GraphModule, stage: str) -> None:
    def progress(iterable: Any, description: str, total: Optional[int] = None) -> Any:
        return job.progress(iterable, f"{stage}: {description}", total)

    calibrate(sim, job.loaders.fresh("calibration"), job.config.quant.calib_batches, progress=progress)


def _qat(job: _Job, sim: fx.GraphModule) -> None:
    qat = job.config.qat
    seconds = _train(job, "qat", sim, qat.epochs, qat)
    job.finish("qat", "QAT", sim, seconds, after="ptq", note=f"trained for {qat.epochs} epochs")


def _reestimate(job: _Job, sim: fx.GraphModule) -> None:
    reest, has_qat = job.config.reest, job.config.qat.epochs > 0
    has_ranges = bool(activation_quantizers(sim))
    bypass = reest.act_quant is ActQuant.bypassed or (reest.act_quant is ActQuant.auto and not has_qat)
    again = reest.recalibrate is Recalibrate.always or (reest.recalibrate is Recalibrate.auto and not has_qat)
    again = again and has_ranges
    before = "qat" if has_qat else "ptq"
    if again:  # what the new ranges do on their own, so that the two effects are not mixed
        alone = copy.deepcopy(sim)
        _, seconds = _timed(lambda: _calibrate(job, alone, "recalibrate only"))
        job.finish("recal_only", "recalibrate only", alone, seconds, after=before, note="for comparison, then discarded")
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
    note = f"{handle.num_batches} batches, {handle.passes} passes" + (", then recalibrated" if again else "")
    evaluation = job.finish("reest", "re-estimate BN", sim, seconds, after=before, note=note, passes=handle.passes)
    job.metrics({"reest/delta_top1": evaluation.top1 - job.evaluations[before].top1})
    job.exceptions("not re-estimated", [(name, "has no running statistics") for name in handle.without_statistics])


def _fold(job: _Job, sim: fx.GraphModule) -> fx.GraphModule:
    config, before = job.config, list(job.evaluations)[-1]
    per_channel = config.fold.mode is FoldMode.scale
    (folded, report), seconds = _timed(lambda: fold_batch_norms(sim, mode="scale" if per_channel else "weight"))
    _report_fold(job, report)
    difference = compare_logits(sim, folded, job.loaders.test, progress=job.progress)
    exact = not report.lossy
    if exact and not difference.relative <= LARGEST_FOLD_ERROR:
        raise RuntimeError(
            f"Folding changed the network: its logits differ by {difference.relative:.2e} of the largest. This is a defect "
            "of bnre_exp; please report it with the network and the configuration."
        )
    unrounded = evaluate(folded, job.loaders.test, progress=job.progress, description="fold: evaluate")
    agreement = float((unrounded.predictions == job.evaluations[before].predictions).double().mean())
    metrics = {
        "max_abs_logit_diff": difference.largest, "max_rel_logit_diff": difference.relative, "top1_agreement": agreement,
        "folded_bns": len(report.folded), "kept_bns": len(report.kept),
    }  # fmt: skip
    if config.fold.bias_bits is not None:
        biases = quantize_biases(folded, config.fold.bias_bits)
        job.exceptions("bias not rounded", biases.kept)
        job.exceptions("note", [(name, f"weight scale of {n} channels raised so that the bias fits") for name, n in biases.rescaled])
    note = f"{len(report.folded)} BNs folded, {len(report.kept)} not; logits differ by {difference.relative:.1e} (relative)"
    rounded = job.finish("fold", "fold", folded, seconds, after=before, note=note, **metrics)
    if config.fold.bias_bits is not None:
        job.metrics({"fold/bias_delta_top1": rounded.top1 - unrounded.top1})
    return folded  # type: ignore[no-any-return]


def _report_fold(job: _Job, report: FoldReport) -> None:
    job.exceptions("BN not folded", report.kept)
    job.exceptions("folded with loss", report.lossy)


def _export(job: _Job, folded: fx.GraphModule) -> None:
    path = job.run_dir / "folded"
    foreign, seconds = _timed(lambda: save_folded(folded, path))
    job.results.folded = path
    job.results.summary.places["folded checkpoint"] = str(path)
    job.exceptions("note", [(name, "outside the checkpoint's allow-list; load_folded needs model=") for name in foreign])
    loaded = load_folded(path, model=folded if foreign else None).to(job.device)
    evaluation = job.finish("export", "export, loaded again", loaded, seconds, after="fold")
    if not torch.equal(evaluation.predictions, job.evaluations["fold"].predictions):
        raise RuntimeError("The exported checkpoint, loaded again, predicts differently. This is a defect of bnre_exp.")
    megabytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
    job.metrics({"export/megabytes": megabytes})
    final = {name: value for name, value in job.results.metrics.items() if name.endswith("/top1")}
    job.log.checkpoint(path, _run_name(job.config), flatten(job.config), final)


def _leave_report(job: _Job) -> None:
    """The report of a whole run, or of what is finished when a stage fails."""
    summary, log = job.results.summary, job.log
    summary.places["run folder"] = str(job.run_dir)
    if log.uri is not None and log.experiment_id is not None:
        summary.places["MLflow"] = ui_command(log.uri)
        summary.places["  then open"] = compare_link(log.experiment_id)
    path = job.run_dir / "report.md"
    path.write_text(markdown(summary))
    log.artifact(path)
    config_file = job.run_dir / "config.yaml"
    if config_file.exists():
        log.artifact(config_file)
