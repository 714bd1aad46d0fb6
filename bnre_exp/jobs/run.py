"""One job: which stage follows which, found in the store or computed, and what each reports."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_model
from torch import nn

from bnre_exp.config import Config, ExportFormat, flatten
from bnre_exp.errors import UserError
from bnre_exp.jobs.plan import Planned
from bnre_exp.jobs.prepare import Job, Results, leave_report, open_store, prepare
from bnre_exp.jobs.provenance import git_tags
from bnre_exp.jobs.stages.export import export, exported
from bnre_exp.jobs.stages.fold import fold, fold_again
from bnre_exp.jobs.stages.fp32 import fp32
from bnre_exp.jobs.stages.network import STATE, Passing, save_state
from bnre_exp.jobs.stages.outcome import Outcome, read_outcome, write_outcome
from bnre_exp.jobs.stages.ptq import ptq
from bnre_exp.jobs.stages.qat import qat
from bnre_exp.jobs.stages.reest import reest
from bnre_exp.jobs.stages.setting import Setting
from bnre_exp.jobs.stages.snapshots import SnapshotFolder
from bnre_exp.jobs.store import Entry, Slot
from bnre_exp.report.summary import Summary, print_summary
from bnre_exp.tracking import open_run

Work = Callable[[Setting, nn.Module, SnapshotFolder | None], tuple[Outcome, nn.Module]]
WORK: dict[str, Work] = {"fp32": fp32, "ptq": ptq, "qat": qat, "reest": reest, "fold": fold}


def run(
    config: Config,
    *,
    run_dir: Path,
    overrides: Sequence[str] = (),
    console: Console,
    parent: Path | None = None,
    since: float | None = None,
) -> Results:
    """Run all stages of one job; everything it leaves is below ``run_dir``, in the store and in MLflow.

    parent: folder of the sweep that the job is part of. since: when the command began (seconds since 1970), for
    ``store.mode=refresh``; None: now.

    Raises ``UserError`` for a user's mistake, before training wherever it can be told before. What is finished by then
    stays: metrics in ``metrics.jsonl`` and MLflow, results in the store, the trained network in ``fp32.safetensors``.
    """
    name = config.tracking.run_name or run_name(config)
    code = git_tags(Path.cwd()) or git_tags(Path(__file__).parent)  # the user's project, else this package's checkout
    tags = {**code, "overrides": " ".join(overrides)}
    with (
        open_run(
            run_dir,
            params=flatten(config),
            tags=tags,
            output_dir=Path(config.runtime.output_dir),
            experiment=config.tracking.experiment,
            run_name=name,
            uri=config.tracking.uri,
            enabled=config.tracking.enabled,
            parent=parent,
            connect=False,
        ) as log,
        open_store(config, time.time() if since is None else since) as store,
    ):
        console.print(name, style="bold", highlight=False, markup=False)
        job = prepare(config, run_dir, log, console, store, Summary(name))
        try:
            _run_stages(job)
        finally:
            leave_report(job)
    print_summary(job.results.summary, console, with_places=parent is None)
    results = job.results
    del job
    gc.collect()  # graphs and parametrized layers are reference cycles; over a sweep they would pile up
    return results


def run_name(config: Config) -> str:
    """What a run is called unless ``tracking.run_name`` says: network, dataset, bits, QAT or PTQ, batches."""

    def bits(value: int | None) -> str:
        return "fp" if value is None else str(value)

    file = Path(config.model.path).stem if config.model.path else None
    model = config.model.name or file or config.model._target_.rpartition(".")[2]
    dataset = config.dataset._target_.rpartition(".")[2]
    scheme = f"w{bits(config.quant.weight_bits)}a{bits(config.quant.act_bits)}"
    scheme += "" if config.quant.per_channel else "-per-tensor"
    return f"{model}-{dataset}-{scheme}-{'qat' if config.qat.epochs else 'ptq'}-reest{config.reest.num_batches}"


def _run_stages(job: Job) -> None:
    config, passing = job.config, Passing(job.setting)
    off = {"QAT": (config.qat.epochs, "qat.epochs"), "re-estimation": (config.reest.num_batches, "reest.num_batches")}
    job.exceptions("note", [(what, f"off ({name}=0)") for what, (value, name) in off.items() if not value])
    folded: nn.Module | None = None
    for planned in job.planned:
        if planned.stage == "export":
            _export(job, planned, passing, folded)
        else:
            folded = _stage(job, planned, passing)
        if planned.stage == "fp32":
            _keep_fp32(job, passing)
    job.log.connect()


def _stage(job: Job, planned: Planned, passing: Passing) -> nn.Module | None:
    """Find or compute one stage and report it. Returns the folded network if this stage has just made it."""
    stage, folded = planned.stage, None
    with job.store.stage(stage, planned.depends, _waiting(job, stage), passing.content) as slot:
        snapshots = SnapshotFolder(slot.partial) if slot.partial is not None else None
        if slot.entry is not None:
            outcome, how = read_outcome(slot.entry.folder), "reused"
            if stage != "fold":
                passing.found(slot.entry.folder, _content(slot.entry), is_sim=stage != "fp32")
        else:
            job.log.connect()
            started = time.perf_counter()
            outcome, network = WORK[stage](job.setting, passing.take(), snapshots)
            outcome.metrics[f"{stage}/total_seconds"] = time.perf_counter() - started  # with its evaluation
            how = "resumed" if snapshots is not None and snapshots.resumed else "computed"
            _keep(slot, planned, outcome, None if stage == "fold" else network)
            if stage == "fold":
                folded = network
            else:
                passing.computed(network, slot.entry.folder if slot.entry else None, _content(slot.entry))
    job.report(stage, outcome, how)
    return folded


def _content(entry: Entry | None) -> str | None:
    """SHA-256 of the network that an entry holds."""
    return None if entry is None else str(entry.files[STATE]["sha256"])


def _keep(slot: Slot, planned: Planned, outcome: Outcome, network: nn.Module | None) -> None:
    def fill(folder: Path) -> None:
        write_outcome(folder, outcome)
        if network is not None:
            save_state(folder, network)

    slot.write(planned.config, fill)


def _waiting(job: Job, stage: str) -> Callable[[str], None]:
    def say(who: str) -> None:
        job.console.print(f"  {stage}: another job computes it ({who}); waiting", highlight=False)

    return say


def _keep_fp32(job: Job, passing: Passing) -> None:
    path = job.run_dir / "fp32.safetensors"
    if passing.folder is not None:
        shutil.copyfile(passing.folder / STATE, path)
    else:
        save_model(passing.take(), str(path))
    job.results.summary.places["FP32 weights"] = str(path)
    top1, least = job.setting.evaluations["fp32"].top1, job.config.fp32.min_top1
    if top1 < least:
        raise UserError(
            f"fp32/top1={top1:.4f} is below fp32.min_top1={least}: this is not the network "
            "that was expected. Check model.weights or model.checkpoint, the preprocessing and the class order, "
            "or train longer."
        )


def _export(job: Job, planned: Planned, passing: Passing, folded: nn.Module | None) -> None:
    with job.store.stage("export", planned.depends, _waiting(job, "export"), passing.content) as slot:
        if slot.entry is not None:
            outcome, how = read_outcome(slot.entry.folder), "reused"
            _copy_exported(job, slot.entry.folder, job.run_dir)
        else:
            job.log.connect()
            started = time.perf_counter()
            network = folded if folded is not None else fold_again(job.setting, passing.take())
            outcome, how = export(job.setting, network, job.run_dir), "computed"
            outcome.metrics["export/total_seconds"] = time.perf_counter() - started

            def fill(folder: Path) -> None:
                write_outcome(folder, outcome)
                _copy_exported(job, job.run_dir, folder)

            slot.write(planned.config, fill)
    job.report("export", outcome, how)
    _list_exported(job)


def _copy_exported(job: Job, source: Path, target: Path) -> None:
    for path in exported(job.config.export, source).values():
        copy = target / path.name
        if path.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(path, copy)
        else:
            shutil.copyfile(path, copy)


def _list_exported(job: Job) -> None:
    """Say where the files are, and list what is a model in MLflow."""
    files, places, name = exported(job.config.export, job.run_dir), job.results.summary.places, run_name(job.config)
    final = {name: value for name, value in job.results.metrics.items() if name.endswith("/top1")}
    if path := files.get(ExportFormat.checkpoint):
        job.results.folded = path
        places["folded checkpoint"] = str(path)
        job.log.model(path, name, "bnre_exp folded checkpoint", flatten(job.config), final)
    if path := files.get(ExportFormat.onnx):
        places["ONNX model"] = str(path)
        example = job.setting.loaders.example()[:1].contiguous().numpy()
        job.log.onnx_model(path, f"{name}-onnx", example, flatten(job.config), final)
    if path := files.get(ExportFormat.encodings):
        places["AIMET encodings"] = str(path)
        job.log.artifact(path)
