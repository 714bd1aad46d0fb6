"""What the stages of a job share, its data and its network, and the checks that come before any of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bnre_exp.algorithms.bn_statistics import Estimation, has_running_statistics, names_with_statistics
from bnre_exp.algorithms.feeding import to_device
from bnre_exp.algorithms.fold_loss import fold_loss
from bnre_exp.algorithms.reestimate import chosen_layers
from bnre_exp.algorithms.speed import check_compiler
from bnre_exp.config import Config, Device, FoldMode, MemoryFormat, QatBn
from bnre_exp.data.classes import count_classes
from bnre_exp.data.loaders import Loaders, build_loaders
from bnre_exp.data.preprocess import resolve_preprocessing
from bnre_exp.data.samples import CLASS, KINDS
from bnre_exp.data.served import check_served
from bnre_exp.data.spec import DataSpec
from bnre_exp.errors import UserError, counted, few
from bnre_exp.jobs.plan import Planned, plan
from bnre_exp.jobs.reporting import Job, Results, log_inputs
from bnre_exp.jobs.stages.export import check_export
from bnre_exp.jobs.stages.fp32 import epochs_of
from bnre_exp.jobs.stages.network import check_storable
from bnre_exp.jobs.stages.qat import check_qat
from bnre_exp.jobs.stages.setting import Setting, seed
from bnre_exp.jobs.stages.simulation import modes, scheme
from bnre_exp.jobs.stages.table import STAGES
from bnre_exp.jobs.store import Store
from bnre_exp.models.build import build_model, check_output, input_channels
from bnre_exp.models.zoo import BuiltModel
from bnre_exp.quantsim.insert import quantize
from bnre_exp.quantsim.sim import sim_report
from bnre_exp.quantsim.tracing.functional import callers_of_batch_norm
from bnre_exp.report.console import ConsoleProgress
from bnre_exp.report.summary import Summary
from bnre_exp.targets import resolve_target, what_failed
from bnre_exp.tasks.build import build_task
from bnre_exp.tracking import RunLog

DEFAULT_THREADS = torch.get_num_threads()  # of the process, before a job changes it
TRIED = 8  # images, before anything is trained


def prepare(
    config: Config, run_dir: Path, log: RunLog, console: Console, store: Store, name: str
) -> tuple[Job, list[Planned]]:
    """Data and network, every check that needs no training, and the stages to run."""
    torch.set_num_threads(config.runtime.threads or DEFAULT_THREADS)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    progress = ConsoleProgress(console)

    def say(line: str) -> None:
        if not console.is_terminal:  # there are no progress bars then
            console.print(line, highlight=False)

    device = _device(config.runtime.device)
    targets = _targets(config)
    config = _with_classes(config, count_classes(_data_spec(config, device, targets)))
    task, built = build_task(config.task._target_, config.task.kwargs), _network(config)
    if built.submodules and not config.model.submodules:
        config = replace(config, model=replace(config.model, submodules=list(built.submodules)))
    loaders = _loaders(config, built, device, targets, store, progress)
    seen = 1 + max((high for _, high in loaders.label_range.values()), default=0)
    if config.dataset.num_classes is None and seen > 1:  # the dataset lists no classes: as many as its images show
        config = _with_classes(config, seen)
        task = build_task(config.task._target_, config.task.kwargs)
    if built.at_size is not None:
        built.at_size(loaders.preprocessing.image_size)
    if hasattr(task, "begin"):
        task.begin(built.module)
    setting = Setting(config, device, task, loaders, built, progress, log.metrics, say)
    if config.runtime.compile:
        check_compiler(device.type)
    _check(setting)
    summary = Summary(name, task.headline.label)
    results = Results({}, summary, setting.evaluations)
    job, planned = Job(config, run_dir, log, console, store, setting, results), plan(setting)
    _check_before_training(job, planned)
    log_inputs(job)
    job.exceptions("note", [stage.off for stage in STAGES if stage.off and not stage.is_on(config)])
    job.exceptions("note", _of_frozen(config))
    job.exceptions("note", [("model", note) for note in (*built.notes, *_other_names(built, loaders))])
    job.exceptions("note", [("store", note) for note in loaders.notes if store.mode != "off"])
    return job, planned


def _of_frozen(config: Config) -> list[tuple[str, str]]:
    """A note where the weights are trained for the statistics that re-estimation then replaces."""
    is_frozen = config.qat.epochs and (config.qat.bn is QatBn.frozen or config.qat.freeze_bn_epoch == 1)
    if not (is_frozen and config.reest.num_batches):
        return []
    why = (
        "QAT with frozen batch norms fits the weights to the statistics that it starts with; others may harm. Compare "
        "qat and reest, or leave re-estimation to before QAT (qat.prepare=reestimate reest=off)"
    )
    return [("re-estimation", why)]


def _other_names(built: BuiltModel, loaders: Loaders) -> list[str]:
    """A note where a trained network calls its classes otherwise than the dataset does."""
    known = getattr(built.module, "names", None)
    own = [str(known[number]) for number in sorted(known)] if isinstance(known, dict) else []
    if not built.pretrained or loaders.classes is None or own == list(loaders.classes):
        return []
    return [f"its classes are {few(own)}, in this order; the dataset's are {few(loaders.classes)}"] if own else []


def _targets(config: Config) -> str:
    """What the task takes as the target of an image; known from its class, before it is built."""
    kind = getattr(resolve_target(config.task._target_, "task._target_"), "targets", CLASS)
    if kind != CLASS and kind not in KINDS:
        raise UserError(
            f"task._target_={config.task._target_}: its targets are {kind!r}; expected one of "
            f"{', '.join([CLASS, *KINDS])}."
        )
    check_served(resolve_target(config.dataset._target_, "dataset._target_"), str(kind))
    return str(kind)


def _with_classes(config: Config, classes: int | None) -> Config:
    """The configuration with the number of classes, also where the task asks for it."""
    task = config.task
    if task.kwargs.get("num_classes", 0) is None:
        task = replace(task, kwargs={**task.kwargs, "num_classes": classes})
    return replace(config, dataset=replace(config.dataset, num_classes=classes), task=task)


def _network(config: Config) -> BuiltModel:
    model = config.model
    seed(config, "model")
    return build_model(
        model._target_, name=model.name, path=model.path, kwargs=model.kwargs, num_classes=config.dataset.num_classes,
        weights=model.weights, checkpoint=model.checkpoint, strip_prefixes=model.strip_prefixes, strict=model.strict,
        replace_head=model.replace_head, trusted=model.trusted,
    )  # fmt: skip


def _loaders(
    config: Config, built: BuiltModel, device: torch.device, targets: str, store: Store, progress: ConsoleProgress
) -> Loaders:
    data = config.dataset
    channels = input_channels(built.module) if data.channels == "auto" else int(data.channels)
    is_plain = built.takes_unit_range or targets in ("image", "objects")  # detectors normalize for themselves
    mean, std = ([0.0], [1.0]) if is_plain else (data.default_mean, data.default_std)
    if channels == 1:
        mean, std = [fmean(mean)], [fmean(std)]
    preprocessing = resolve_preprocessing(
        built.preprocessing, image_size=data.image_size, mean=data.mean, std=data.std,
        default_image_size=data.default_image_size, default_mean=mean, default_std=std,
        channels=channels, fit=data.fit or ("crop" if targets == CLASS else KINDS[targets].fit),
    )  # fmt: skip
    digests = store.folder / "digests" if store.mode != "off" else None
    return build_loaders(
        _data_spec(config, device, targets), preprocessing=preprocessing, progress=progress, digests_folder=digests
    )


def _data_spec(config: Config, device: torch.device, targets: str) -> DataSpec:
    data = config.dataset
    return DataSpec(
        data._target_, root=data.root, kwargs=data.kwargs, seed=config.seed, batch_size=data.batch_size,
        eval_batch_size=data.eval_batch_size, val_fraction=data.val_fraction, train_limit=data.train_limit,
        test_limit=data.test_limit, in_memory=data.in_memory, augment=data.augment, workers=config.runtime.workers,
        pin_memory=device.type == "cuda", num_classes=data.num_classes, targets=targets,
    )  # fmt: skip


def _check(setting: Setting) -> None:
    """What network, data and task must be, for each other; then the network goes to its device."""
    config, network, task = setting.config, setting.built.module, setting.task
    check_storable(network)
    task.check_labels(setting.loaders.label_range)
    check_output(network, setting.loaders.example(), task)
    if config.reest.num_batches and not (has_running_statistics(network) or callers_of_batch_norm(network)):
        raise UserError("reest: the network has no batch norm with running statistics to re-estimate; set reest=off.")
    has_3d = any(p.dim() == 5 for p in network.parameters())
    channels_last = config.runtime.memory_format is MemoryFormat.channels_last and not has_3d
    network.to(setting.device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _check_before_training(job: Job, stages: list[Planned]) -> None:
    """Can the network be quantized, and written as is asked for? A mistake should not be told after hours of training
    and evaluation; what is known from an earlier job was possible then."""
    known = {planned.stage.name: job.store.has(planned.stage.name, planned.depends) for planned in stages}
    setting, model = job.setting, job.config.model
    if known.get("export", known["fold"]) or (known["fp32"] and known.get("qat", True)):
        return
    _try_task(setting)
    quick = replace(scheme(job.config), weight_range="minmax")  # ranges do not matter here
    how: dict[str, Any] = {
        "leaf_modules": model.leaf_modules,
        "modes": modes(job.config),
        "submodules": model.submodules,
    }
    sim = quantize(setting.built.module, setting.example(), quick, **how)
    _check_reest(job, sim)
    check_qat(job.config.qat, sim)
    _tell_fold_loss(job, sim)
    setting.trial = sim_report(sim)
    check_export(sim, job.config.export, setting.loaders.example())


def _tell_fold_loss(job: Job, sim: nn.Module) -> None:
    """Before anything is trained: folding will round weights a second time. How much that costs is told there."""
    if job.config.quant.per_channel and job.config.fold.mode is FoldMode.scale:
        return  # exact: no gamma has changed its sign yet
    losses = fold_loss(sim, job.config.fold.mode.value)
    for reason, remedy in dict.fromkeys((loss.reason, loss.remedy) for loss in losses):
        count = counted(sum(loss.reason == reason for loss in losses), "layer")
        job.exceptions("note", [("folding", f"will cost {count} accuracy: {reason}; {remedy}")])


def _check_reest(job: Job, sim: nn.Module) -> None:
    how = job.config.reest
    if not how.num_batches:
        return
    if not has_running_statistics(sim):
        raise UserError("reest: no batch norm of the simulation has running statistics to re-estimate; set reest=off.")
    if (how.curve or how.ablate) and job.setting.loaders.validation is None:
        raise UserError(
            f"reest.{'curve' if how.curve else 'ablate'} is measured on the validation data, and there are none; set "
            "dataset.val_fraction above 0."
        )
    try:
        Estimation(how.method.value, how.momentum, how.tolerance, how.prior, how.passes, tuple(how.curve))
        chosen_layers(names_with_statistics(sim), how.layers or None)
    except UserError as error:
        raise UserError(f"reest.{error}") from error


def _try_task(setting: Setting) -> None:
    """Measure a copy of the network, and take its training loss, on a few images. Raises ``UserError`` if network, task
    and data do not fit."""
    config, task, network = setting.config, setting.task, copy.deepcopy(setting.built.module)
    inputs, targets = next(iter(setting.loaders.fresh("calibration")))
    few = to_device((inputs[:TRIED], targets[:TRIED]), setting.device)
    meter = task.meter()
    steps: dict[str, Callable[[], Any]] = {"measuring": lambda: meter.update(task.feed(network.eval(), few), few)}
    if epochs_of(setting) or config.qat.epochs:
        steps["training"] = lambda: task.loss(task.feed(network.train(), few), few)
    for step, work in steps.items():
        try:
            with torch.no_grad():
                work()
        except UserError:
            raise
        except Exception as error:  # the user's network and task
            raise UserError(
                f"task: {step} fails on the first {len(inputs[:TRIED])} images: {what_failed(error)} "
                f"Do the network ({type(network).__name__}), the task ({type(task).__name__}) and the data fit?"
            ) from error
    measured: list[str] = []
    with suppress(UserError):  # so few images may show nothing that can be measured
        measured = list(meter.compute().metrics)
    if measured:
        _check_objective(config.objective, measured)


def _check_objective(objective: str | None, measured: Sequence[str]) -> None:
    """Raise ``UserError`` if a search is to go by a metric of the validation data that the task does not measure."""
    stage, _, name = (objective or "").partition("/")
    if name.startswith("val_") and name.removeprefix("val_") not in measured:
        names = ", ".join(f"{stage}/val_{metric}" for metric in measured)
        raise UserError(f"objective={objective}: the task does not measure that; it measures {names}.")


def open_store(config: Config, since: float) -> Store:
    """The stage store of a job that began, or whose sweep began, at ``since`` (seconds since 1970)."""
    folder = Path(config.store.dir or Path(config.runtime.output_dir) / "store")
    return Store(folder, mode=config.store.mode.value, max_bytes=config.store.max_gb * 1e9, since=since)


def _device(wanted: Device) -> torch.device:
    if wanted is Device.cuda and not torch.cuda.is_available():
        raise UserError("runtime.device=cuda: torch sees no CUDA device here; use runtime.device=cpu or auto.")
    use_cuda = wanted is not Device.cpu and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")
