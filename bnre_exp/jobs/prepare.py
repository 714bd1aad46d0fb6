"""What the stages of a job share: its data, its log, its table; and the checks that come before any of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from bnre_exp.algorithms.bn_statistics import has_running_statistics
from bnre_exp.config import Config, Device, MemoryFormat
from bnre_exp.data.loaders import Loaders, Preprocessing, build_loaders, check_labels
from bnre_exp.data.preprocess import resolve_preprocessing
from bnre_exp.errors import UserError
from bnre_exp.jobs.plan import Planned, plan
from bnre_exp.jobs.stages.export import check_export
from bnre_exp.jobs.stages.network import check_storable
from bnre_exp.jobs.stages.outcome import Outcome
from bnre_exp.jobs.stages.setting import Setting, scheme, seed
from bnre_exp.jobs.store import Store
from bnre_exp.models.build import build_model, check_head
from bnre_exp.quantsim.insert import quantize
from bnre_exp.report.console import ConsoleProgress
from bnre_exp.report.layers import layers_markdown
from bnre_exp.report.summary import RUN_FOLDER, StageResult, Summary, markdown
from bnre_exp.tracking import RunLog
from bnre_exp.tracking.links import compare_link, ui_address, ui_command

DEFAULT_THREADS = torch.get_num_threads()  # of the process, before a job changes it


@dataclass
class Results:
    """What a job measured. metrics: by MLflow name; summary: the table; folded: the checkpoint's folder."""

    metrics: dict[str, float]
    summary: Summary
    folded: Path | None = None


@dataclass
class Job:
    """One job on its way."""

    config: Config
    run_dir: Path
    log: RunLog
    console: Console
    store: Store
    setting: Setting
    planned: list[Planned]
    results: Results

    def report(self, stage: str, outcome: Outcome, how: str) -> None:
        """Log and print what a stage measured. how: "computed", "resumed" or "reused"."""
        for epoch, values in outcome.curves:
            self.metrics(values, epoch)
        for row in outcome.measured:
            self.setting.evaluations[row.stage] = row.evaluation
            top1, loss = row.evaluation.top1, row.evaluation.loss
            delta = top1 - self.setting.evaluations[row.after].top1 if row.after else None
            note = "; ".join(text for text in (row.note, "" if how == "computed" else how) if text)
            self.results.summary.stages.append(StageResult(row.label, top1, delta, loss, row.seconds, note))
            self.metrics({f"{row.stage}/top1": top1, f"{row.stage}/loss": loss, f"{row.stage}/seconds": row.seconds})
            self.metrics({f"{row.stage}/{name}": value for name, value in row.metrics.items()})
            change = "" if delta is None else f" ({delta:+.4f})"
            taken = "reused" if how == "reused" else f"{row.seconds:.1f} s"
            self.console.print(f"  {row.label}: top-1 {top1:.4f}{change}, {taken}", highlight=False)
        self.metrics(outcome.metrics)
        for heading, rows in outcome.exceptions:
            self.exceptions(heading, rows)
        if outcome.layers is not None:
            self._list_layers(outcome.layers)
        self.log.tag_once(f"stage.{stage}", how)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log metrics by their MLflow names."""
        if values:
            self.log.metrics(values, step)
            self.results.metrics.update(values)

    def exceptions(self, heading: str, rows: Sequence[tuple[str, str]]) -> None:
        """Add ``(name, reason)`` rows to the report."""
        self.results.summary.exceptions.setdefault(heading, []).extend(rows)

    def _list_layers(self, columns: dict[str, list[str]]) -> None:
        """Where quantizers are, with which ranges, and which BN is folded where."""
        path = self.run_dir / "layers.md"
        path.write_text(layers_markdown(self.results.summary.title, columns))
        self.log.artifact(path)
        self.log.table("layers.json", columns)
        self.results.summary.places["layer by layer"] = str(path)


def prepare(config: Config, run_dir: Path, log: RunLog, console: Console, store: Store, summary: Summary) -> Job:
    """Data and network, and every check that needs no training."""
    torch.set_num_threads(config.runtime.threads or DEFAULT_THREADS)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    device = _device(config.runtime.device)
    model, data = config.model, config.dataset
    seed(config, "model")
    built = build_model(
        model._target_, name=model.name, path=model.path, kwargs=model.kwargs, num_classes=data.num_classes,
        weights=model.weights, checkpoint=model.checkpoint, strip_prefixes=model.strip_prefixes, strict=model.strict,
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
        digests_folder=store.folder / "digests" if store.mode != "off" else None,
    )  # fmt: skip
    check_storable(built.module)
    check_labels(loaders, data.num_classes)
    example = loaders.example()
    check_head(built.module, example, data.num_classes)
    if config.reest.num_batches and not has_running_statistics(built.module):
        raise UserError("reest: the network has no batch norm with running statistics to re-estimate; set reest=off.")
    has_3d = any(p.dim() == 5 for p in built.module.parameters())
    channels_last = config.runtime.memory_format is MemoryFormat.channels_last and not has_3d
    built.module.to(device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def say(line: str) -> None:
        if not console.is_terminal:  # there are no progress bars then
            console.print(line, highlight=False)

    setting = Setting(config, device, loaders, built, progress, log.metrics, say)
    planned = plan(setting)
    known = {stage.stage: store.has(stage.stage, stage.depends) for stage in planned}
    trains = any(not known[stage] for stage in ("fp32", "qat") if stage in known) and not known["export"]
    if not known["ptq"] or trains:  # only to fail before training
        sim = quantize(built.module, example.to(device), scheme(config), leaf_modules=model.leaf_modules)
        if trains:
            check_export(sim, config.export, example)
    _log_inputs(log, config, loaders, preprocessing)
    job = Job(config, run_dir, log, console, store, setting, planned, Results({}, summary))
    job.exceptions("note", [("model", note) for note in built.notes])
    job.exceptions("note", [("store", note) for note in loaders.notes if store.mode != "off"])
    return job


def open_store(config: Config, since: float) -> Store:
    """The stage store of a job that began, or whose sweep began, at ``since`` (seconds since 1970)."""
    folder = Path(config.store.dir or Path(config.runtime.output_dir) / "store")
    return Store(folder, mode=config.store.mode.value, max_bytes=config.store.max_gb * 1e9, since=since)


def _device(wanted: Device) -> torch.device:
    if wanted is Device.cuda and not torch.cuda.is_available():
        raise UserError("runtime.device=cuda: torch sees no CUDA device here; use runtime.device=cpu or auto.")
    use_cuda = wanted is not Device.cpu and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def _log_inputs(log: RunLog, config: Config, loaders: Loaders, preprocessing: Preprocessing) -> None:
    log.tags({"preprocessing": json.dumps(preprocessing.describe())})
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
    summary.places[RUN_FOLDER] = str(job.run_dir)
    if log.uri is not None and log.experiment_id is not None:
        summary.places["MLflow"] = ui_command(log.uri)
        summary.places["  then open"] = compare_link(log.experiment_id, ui_address(log.uri))
    if log.undelivered:
        job.exceptions("note", [("MLflow", f"{log.undelivered} records are not there yet: bnre-exp-sync")])
    path = job.run_dir / "report.md"
    path.write_text(markdown(summary))
    log.artifact(path)
    config_file = job.run_dir / "config.yaml"
    if config_file.exists():
        log.artifact(config_file)
