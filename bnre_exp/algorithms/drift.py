"""Which batch norms moved: their statistics before and after a re-estimation, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bnre_exp.algorithms.bn_statistics import Statistics
from bnre_exp.quantsim.groups import find_groups
from bnre_exp.quantsim.nodes import module_of
from bnre_exp.quantsim.sim import graphs_of
from bnre_exp.quantsim.whole import named

# Headings of drift_columns
BN, KIND, SHIFT, RATIO, KL = "BN", "kind", "shift [sd]", "variance ratio", "KL [nats]"
SHIFTS = ("shift 5% [sd]", "shift 50% [sd]", "shift 95% [sd]")  # of the channels
RATIOS = ("ratio 5%", "ratio 50%", "ratio 95%")
_QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class BnDrift:
    """How far the statistics of a batch norm moved. Of its channels, before (0) and after (1), with means m and
    variances v (eps included):

    shift: root mean square of (m1 - m0) / sqrt(v0); ratio: geometric mean of v1 / v0; kl: mean of the Kullback-Leibler
    divergence [nats] of the normal distribution after from the one before; shifts, ratios: quantiles over the channels
    (5, 50 and 95 percent), the shift with its sign. kind: of the layer that it folds into: depthwise, pointwise,
    grouped, convolution, transposed, linear; "alone" without one, "" where that is not known.
    """

    name: str
    kind: str
    channels: int
    shift: float
    ratio: float
    kl: float
    shifts: tuple[float, ...]
    ratios: tuple[float, ...]


def bn_drift(
    model: nn.Module, before: Mapping[str, Statistics], after: Mapping[str, Statistics]
) -> tuple[BnDrift, ...]:
    """The drift of every batch norm in ``after``, in the order of the model.

    before, after: running mean and variance, ``[C]`` each, by the name that the BN has in ``model``; those of a
    :class:`~bnre_exp.ReestimationHandle`.
    """
    kinds, rows = _kinds(model), []
    for name, module in model.named_modules():
        if name in after:
            moved = _drift(before[name], after[name], float(getattr(module, "eps", 0.0)))
            rows.append(BnDrift(name, kinds.get(name, ""), len(after[name][0]), *moved))
    return tuple(rows)


def drift_columns(rows: Sequence[BnDrift]) -> dict[str, list[str | int | float]]:
    """Column by heading, a value for every row."""
    return {
        BN: [row.name for row in rows],
        KIND: [row.kind for row in rows],
        "channels": [row.channels for row in rows],
        SHIFT: [row.shift for row in rows],
        RATIO: [row.ratio for row in rows],
        KL: [row.kl for row in rows],
        **{name: [row.shifts[place] for row in rows] for place, name in enumerate(SHIFTS)},
        **{name: [row.ratios[place] for row in rows] for place, name in enumerate(RATIOS)},
    }


def _drift(
    before: Statistics, after: Statistics, eps: float
) -> tuple[float, float, float, tuple[float, ...], tuple[float, ...]]:
    (m0, v0), (m1, v1) = ((mean.double(), var.double() + eps) for mean, var in (before, after))
    tiny = torch.finfo(torch.float64).tiny  # a variance of zero without eps
    v0, v1 = v0.clamp(min=tiny), v1.clamp(min=tiny)
    shifts, ratios = (m1 - m0) / v0.sqrt(), v1 / v0
    kl = 0.5 * (ratios + shifts.square() - 1 - ratios.log())
    shift, ratio = shifts.square().mean().sqrt(), ratios.log().mean().exp()
    return float(shift), float(ratio), float(kl.mean()), _quantiles(shifts), _quantiles(ratios)


def _quantiles(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(values.quantile(values.new_tensor(_QUANTILES)).tolist())


def _kinds(model: nn.Module) -> dict[str, str]:
    """Of every batch norm of a simulation, what it folds into."""
    kinds: dict[str, str] = {}
    for part, graph in graphs_of(model).items():
        if "bnre_exp" not in graph.meta:  # a graph of the user's
            continue
        grouping = find_groups(graph)
        kinds.update((named(part, name), "alone") for name in grouping.kept)
        for group in grouping.groups:
            layer = module_of(group.layer)
            if group.bn is not None and layer is not None:
                kinds[named(part, str(group.bn.target))] = _kind(layer)
    return kinds


def _kind(layer: nn.Module) -> str:
    if not isinstance(layer, _ConvNd):
        return "linear"
    if isinstance(layer, _ConvTransposeNd):
        return "transposed"
    if layer.groups > 1:
        return "depthwise" if layer.groups == layer.in_channels else "grouped"
    return "pointwise" if set(layer.kernel_size) == {1} else "convolution"
