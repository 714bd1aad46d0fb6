"""What the stages of a job share: its data, its log, its table; and the checks that come before any of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from rich.console import Console
from torch import nn

from bnre_exp.config import Config, Device, MemoryFormat
from bnre_exp.data import Loaders, Preprocessing, build_loaders, check_labels, resolve_preprocessing
from bnre_exp.errors import UserError
from bnre_exp.models import BuiltModel, build_model, check_head
from bnre_exp.provenance import compare_link, ui_command
from bnre_exp.quantsim.insert import quantize
from bnre_exp.quantsim.scheme import LayerRule, QuantScheme
from bnre_exp.report.console import ConsoleProgress
from bnre_exp.report.summary import StageResult, Summary, markdown
from bnre_exp.splits import stream_seed
from bnre_exp.stages.evaluate import Evaluation, evaluate
from bnre_exp.stages.reestimate import has_running_statistics
from bnre_exp.tracking import RunLog

DEFAULT_THREADS = torch.get_num_threads()  # of the process, before a job changes it


@dataclass
class Results:
    """What a job measured. metrics: by MLflow name; summary: the table; folded: the checkpoint's folder."""

    metrics: dict[str, float]
    summary: Summary
    folded: Optional[Path] = None


@dataclass
class Job:
    """One job on its way. evaluations: of each finished stage, in order."""

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
        """Evaluate a stage's network on the test data, log it and add its row, compared with the stage ``after``."""
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
        """Log metrics by their MLflow names."""
        if values:
            self.log.metrics(values, step)
            self.results.metrics.update(values)

    def exceptions(self, heading: str, rows: Sequence[tuple[str, str]]) -> None:
        """Add ``(name, reason)`` rows to the report."""
        self.results.summary.exceptions.setdefault(heading, []).extend(rows)


def seed(config: Config, purpose: str) -> None:
    """Everything random from here on depends on the seed and the purpose, not on what ran before."""
    value = stream_seed(config.seed, purpose)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def prepare(config: Config, run_dir: Path, log: RunLog, console: Console, summary: Summary) -> tuple[Job, BuiltModel]:
    """Data and network, and every check that needs no training."""
    torch.set_num_threads(config.runtime.threads or DEFAULT_THREADS)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    device = _device(config.runtime.device)
    model, data = config.model, config.dataset
    seed(config, "model")
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
    if config.reest.num_batches and not has_running_statistics(built.module):
        raise UserError("reest: the network has no batch norm with running statistics to re-estimate; set reest=off.")
    quantize(built.module, example, scheme(config), leaf_modules=model.leaf_modules)  # only to fail before training
    has_3d = any(p.dim() == 5 for p in built.module.parameters())
    channels_last = config.runtime.memory_format is MemoryFormat.channels_last and not has_3d
    built.module.to(device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    _log_inputs(log, config, loaders, preprocessing)
    job = Job(config, run_dir, log, console, progress, device, loaders, Results({}, summary))
    job.exceptions("note", [("model", note) for note in built.notes])
    return job, built


def _device(wanted: Device) -> torch.device:
    if wanted is Device.cuda and not torch.cuda.is_available():
        raise UserError("runtime.device=cuda: torch sees no CUDA device here; use runtime.device=cpu or auto.")
    use_cuda = wanted is not Device.cpu and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def scheme(config: Config) -> QuantScheme:
    """The quantization scheme that the configuration describes."""
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
    roles: dict[str, list[str]] = {}  # MLflow knows a data set by its name and digest: one for all roles that share it
    for role, indices in loaders.indices.items():
        contents = loaders.digests["test" if role == "test" else "train"].encode() + indices.numpy().tobytes()
        roles.setdefault(hashlib.sha256(contents).hexdigest()[:16], []).append(role)
    for digest, sharing in roles.items():
        profile = {"images": len(loaders.indices[sharing[0]]), **preprocessing.describe()}
        source = config.dataset.root or target
        log.dataset(target.rpartition(".")[2], digest, source, ", ".join(sharing), profile)


def leave_report(job: Job) -> None:
    """The report of a whole run, or of what is finished when a stage fails."""
    summary, log = job.results.summary, job.log
    summary.places["run folder"] = str(job.run_dir)
    if log.uri is not None and log.experiment_id is not None:
        summary.places["MLflow"] = ui_command(log.uri)
        summary.places["  then open"] = compare_link(log.experiment_id)
    if log.undelivered:
        job.exceptions(
            "note", [("MLflow", f"{log.undelivered} records were not taken; all metrics are in metrics.jsonl")]
        )
    path = job.run_dir / "report.md"
    path.write_text(markdown(summary))
    log.artifact(path)
    config_file = job.run_dir / "config.yaml"
    if config_file.exists():
        log.artifact(config_file)
