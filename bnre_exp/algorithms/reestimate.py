"""Re-estimation of batch-norm statistics, undoable."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torchvision.ops import FrozenBatchNorm2d

from bnre_exp.algorithms.bn_statistics import (
    Estimation,
    Statistics,
    StatisticsHandle,
    check_arguments,
    commit,
    names_with_statistics,
    observe_batches,
    write_statistics,
)
from bnre_exp.algorithms.feeding import (
    ForwardFn,
    Passes,
    cached_weights,
    device_of,
    evaluation_mode,
    feed,
    is_ours,
    samples_in,
)
from bnre_exp.algorithms.observed import observed_statistics
from bnre_exp.algorithms.recorder import Recorder
from bnre_exp.algorithms.speed import autocast, check_precision, compiled
from bnre_exp.algorithms.unchanged import unchanged, warn_of_stale_ranges
from bnre_exp.errors import UserError, few
from bnre_exp.progress import Progress, no_progress
from bnre_exp.quantsim.admission import is_exported, refuse_inference, refuse_kind
from bnre_exp.quantsim.quantizers.affine import ChannelAffine
from bnre_exp.quantsim.quantizers.quantizer import Dequantize
from bnre_exp.quantsim.tracing.functional import callers_of_batch_norm
from bnre_exp.quantsim.tracing.network import TracedNetwork, depends_on_shapes_only, up_to_batch_norms


@dataclass(kw_only=True)
class ReestimationHandle(StatisticsHandle):
    """Undoes the re-estimation of a module.

    before, after: running mean and variance of every BN that has new ones, by name. samples: that were seen. largest:
    the BN of which a channel has the largest standard error, and that error; None without a tolerance. curve: what was
    measured, by number of batches. unreached: names of BNs that the forward pass never called, which keep their
    statistics; without_statistics: names of BNs that have none to estimate; frozen: names of FrozenBatchNorm2d
    modules, whose statistics are constants; functional: names of modules that call F.batch_norm themselves, whose
    statistics are not known here and stay.
    """

    unreached: tuple[str, ...]
    without_statistics: tuple[str, ...]
    frozen: tuple[str, ...]
    functional: tuple[str, ...]
    before: Mapping[str, Statistics] = field(repr=False)
    after: Mapping[str, Statistics] = field(repr=False)
    samples: int
    largest: tuple[str, float] | None = None
    curve: tuple[tuple[int, Any], ...] = ()


@torch.no_grad()
def reestimate_bn_stats(
    model: nn.Module,
    dataloader: Iterable[Any] | Callable[[], Iterable[Any]],
    num_batches: int = 100,
    forward_fn: ForwardFn | None = None,
    *,
    method: str = "batch_average",
    momentum: float = 0.1,
    tolerance: float | None = None,
    prior: float = 0.0,
    passes: int = 1,
    layers: str | Sequence[str] | None = None,
    curve: Sequence[int] = (),
    measure: Callable[[], Any] | None = None,
    precision: str = "float32",
    compile: bool = False,
    progress: Progress = no_progress,
) -> ReestimationHandle:
    """Replace the running statistics of every BN that ``model`` calls; in place, and nothing else changes.

    model: any module with BN, a simulation or not. Only its BNs are in training mode meanwhile; dropout is off, and so
    are observers of foreign quantizers (torch.ao). A BN that its user froze (``bn.eval()``) is re-estimated, too.
    dataloader: training data, iterated again if it is shorter than ``num_batches``. Batches: a tensor, or a tuple or
    list whose first element is the input; ``forward_fn(model, batch)`` for anything else.
    method: "batch_average", the plain mean over batches of their means and unbiased variances (as AIMET does);
    "pooled", the statistics of all samples together; "ema", an exponential moving average that starts from the present
    statistics and gives the newest batch the weight ``momentum``, as training does.
    tolerance: stop as soon as the standard error of every channel's mean, over the root of variance + eps, and that of
    its variance, over variance + eps, are not above it; ``num_batches`` is then the most.
    prior: the old statistics count as so many samples (Schneider et al., NeurIPS 2020, equation 3).
    passes: in each after the first, BNs see what the statistics of the one before make of the layers before them; a
    function in place of the loader is called for each, so that all see the same batches.
    layers: names of BNs or patterns (``*``, ``?``): only these are re-estimated; None: all.
    curve: numbers of batches after which ``measure()`` is called, with the statistics so far in place.
    precision: "bfloat16" computes under autocast; statistics stay in their own type. compile: a simulation is computed
    by torch.compile, from the second batch of a shape on, unless ``forward_fn`` is given, a BN lies within a module
    that was kept whole, or what a BN gets is chosen by values (as by a mask).

    Returns a handle that undoes it. Raises ``UserError`` if an argument is out of its range, the loader is empty, a BN
    sees one value per channel, a statistic is not finite, or an observer has seen no data yet; the statistics are then
    those of before. Source: Nagel et al., "Overcoming oscillations in quantization-aware training", ICML 2022, 4.1.
    """
    check_arguments(method, num_batches)
    check_precision(precision)
    how = Estimation(method, momentum, tolerance, prior, passes, tuple(curve))
    names, bns, frozen = _batch_norms(model, layers)
    before = {bn: (bn.running_mean.clone(), bn.running_var.clone()) for bn in bns}
    given = Given(model, dataloader, num_batches, forward_fn, precision, compile, progress)
    results, known = _estimated(given, how, bns, before, measure)
    warn_of_stale_ranges(model, results)
    return ReestimationHandle(
        **known,
        before={bns[bn]: before[bn] for bn in results},
        after={bns[bn]: statistics for bn, statistics in results.items()},
        unreached=tuple(name for bn, name in bns.items() if bn not in results),
        without_statistics=tuple(name for bn, name in names.items() if bn.running_mean is None),
        frozen=frozen,
        functional=callers_of_batch_norm(model),
        _undo=commit(bns, results, write_statistics),
    )


@dataclass(frozen=True)
class Given:
    """What a re-estimation works on, and how that is computed."""

    model: nn.Module
    dataloader: Iterable[Any] | Callable[[], Iterable[Any]]
    num_batches: int
    forward_fn: ForwardFn | None
    precision: str
    compile: bool
    progress: Progress

    def batches(self) -> Iterable[Any]:
        """The loader, for one pass."""
        return self.dataloader() if callable(self.dataloader) else self.dataloader


def _estimated(
    given: Given, how: Estimation, bns: dict[Any, str], before: Mapping[Any, Statistics],
    measure: Callable[[], Any] | None,
) -> tuple[dict[Any, Statistics], dict[str, Any]]:  # fmt: skip
    """New statistics of all BNs that are reached, and what the handle tells of how they were found."""
    model, count, samples = given.model, Passes(), 0
    recorder = Recorder(bns, how.method, how.momentum, with_errors=how.tolerance is not None)
    recorder.check_finite(0)
    observe = _observer(given, recorder, count)
    measured = list[tuple[int, Any]]()

    def take_in(batch: Any) -> None:
        nonlocal samples
        samples += samples_in(batch)
        observe(batch)

    with cached_weights(model, given.forward_fn), unchanged(model):
        for number in observe_batches(given.batches(), given.num_batches, take_in, count, given.progress):
            if number in how.curve and measure is not None:
                with commit(bns, how.beside(before, recorder.results(), samples), write_statistics):
                    measured.append((number, measure()))
            if how.tolerance is not None and max(recorder.errors().values(), default=math.inf) <= how.tolerance:
                break
    results = how.beside(before, recorder.results(), samples)
    for _ in range(how.passes - 1):
        with commit(bns, results, write_statistics):
            found = observed_statistics(
                model, bns, given.batches(), count.batches, given.forward_fn, method=how.method,
                momentum=how.momentum, precision=given.precision, progress=given.progress,
            )  # fmt: skip
        results = how.beside(before, found, samples)
    largest = max(recorder.errors().items(), key=lambda item: item[1], default=None)
    return results, {
        "num_batches": count.batches, "loader_passes": count.passes, "samples": samples, "largest": largest,
        "curve": tuple(measured),
    }  # fmt: skip


def _batch_norms(
    model: nn.Module, layers: str | Sequence[str] | None
) -> tuple[dict[Any, str], dict[Any, str], tuple[str, ...]]:
    """All BNs with their names, those that are re-estimated, and the names of those that are constants."""
    refuse_kind(model, "reestimate_bn_stats")
    device_of(model)  # refuses a network without values
    names: dict[Any, str] = {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    bns = names_with_statistics(model)
    frozen = tuple(name for name, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d))
    _check_any(model, bns, frozen)
    return names, chosen_layers(bns, layers), frozen


def chosen_layers(bns: dict[Any, str], layers: str | Sequence[str] | None) -> dict[Any, str]:
    """The BNs whose names are like one of the patterns. Raises ``UserError`` for a pattern that none is like."""
    if layers is None:
        return bns
    patterns = [layers] if isinstance(layers, str) else list(layers)
    idle = [pattern for pattern in patterns if not fnmatch.filter(bns.values(), pattern)]
    if idle or not patterns:
        raise UserError(
            f"layers={', '.join(idle) or '[]'}: no batch norm of the model has such a name; it has "
            f"{few(list(bns.values()))}."
        )
    return {bn: name for bn, name in bns.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


def _observer(given: Given, recorder: Recorder, count: Passes) -> Callable[[Any], None]:
    """What takes in a batch. A simulation is computed as far as its last batch norm, unless a user's function feeds it,
    or it is compiled, which is done once for the whole of it. Where its calls of batch norms depend on nothing but the
    shape of the input, the first batch of a shape counts them, and later ones need no hooks and may be compiled."""
    model, forward_fn, compile, device = given.model, given.forward_fn, given.compile, device_of(given.model)
    is_plain, network = is_ours(forward_fn) and depends_on_shapes_only(model), model
    if isinstance(model, TracedNetwork) and is_ours(forward_fn) and not compile:
        network = up_to_batch_norms(model)
    calls: dict[Any, dict[Any, int] | None] = {}

    def observe(batch: Any) -> None:
        shape = _shapes_of(batch) if is_plain else None
        known = calls.get(shape)
        speed = compiled(network, compile and known is not None), autocast(device, given.precision)
        with evaluation_mode(model), recorder.batch(known), speed[0], speed[1]:
            feed(network, batch, device, forward_fn)
        recorder.check_finite(count.batches)
        if shape is not None and known is None:
            calls[shape] = recorder.plain_calls()

    return observe


def _shapes_of(batch: Any) -> Any:
    """The shapes of all tensors of a batch, at any depth."""
    if isinstance(batch, Tensor):
        return batch.shape
    if isinstance(batch, dict):
        return tuple((key, _shapes_of(value)) for key, value in batch.items())
    return tuple(map(_shapes_of, batch)) if isinstance(batch, (tuple, list)) else None


def _check_any(model: nn.Module, bns: dict[Any, str], frozen: tuple[str, ...]) -> None:
    """Raise ``UserError`` if there is nothing to re-estimate, with the reason, or nothing that can be written."""
    for bn, name in bns.items():
        if is_lazy(bn.running_mean):
            raise UserError(
                f"The batch norm {name} is lazy and has no statistics yet; run the network on a batch first."
            )
        refuse_inference(bn.running_mean, f"The statistics of the batch norm {name}")
    if not bns and frozen:
        raise UserError(
            f"All {len(frozen)} batch norms of the model are FrozenBatchNorm2d, whose statistics are constants; build "
            "it with norm_layer=torch.nn.BatchNorm2d to re-estimate them (the state dict fits, with strict=False)."
        )
    if not bns:
        raise UserError(f"The model has no batch norm with running statistics: {_why_none(model)}.")


def _why_none(model: nn.Module) -> str:
    modules = dict(model.named_modules())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules.values()):
        return "it is TorchScript, which hides them; re-estimate the nn.Module that it was compiled from"
    if any(is_exported(module) for module in modules.values()):
        return (
            "it is a program of torch.export, whose batch norms, if any, are operations (aten.batch_norm) and not "
            "modules; re-estimate the nn.Module before it is exported"
        )
    if any(isinstance(module, (ChannelAffine, Dequantize)) for module in modules.values()):
        return "it is folded already; re-estimate the simulation, then fold it"
    if own := [name or "the model" for name, module in modules.items() if isinstance(module, _BatchNorm)]:
        return f"each batch is normalized by its own in {', '.join(own[:3])} (track_running_stats=False)"
    if callers := callers_of_batch_norm(model):
        return (
            f"{', '.join(callers[:3])} calls batch norm as a function, whose statistics are not known here; "
            "quantize() makes modules of such calls, which can be re-estimated, as can nn.BatchNorm2d"
        )
    return "no module of it is one (a subclass of torch's _BatchNorm)"
