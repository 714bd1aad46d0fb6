"""A simulation layer by layer, in order of execution: what is quantized how, and where its BN goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from bnre_exp.errors import UserError
from bnre_exp.quantsim.groups import find_groups
from bnre_exp.quantsim.nodes import is_bn, is_relu_like, module_of, sole_user
from bnre_exp.quantsim.operations import is_preserving
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer, WeightQuantizer, positive
from bnre_exp.quantsim.quantizers.scheme import FULL, NARROW
from bnre_exp.quantsim.sim import names_of, sim_report
from bnre_exp.quantsim.whole import named, parts_of


@dataclass(frozen=True)
class LayerRow:
    """One operation of a simulation.

    name: module path, or the graph's name of a function; kind: its class or function. weight_bits, weight_scales,
    per_channel, weight_grid, mirrored: bits and number of scales of the weight, whether that is one a channel, "narrow"
    or "full", and how many channels are on the mirror image of the full grid; None where it has no weight or one in
    floating point. bn: what becomes of the BN, "folded into NAME" or "kept: REASON"; "" without one. activation: name
    of what follows within the operation (a ReLU). act_bits: of the quantizer at its output, None where there is none;
    range: real values ``(low, high)`` that quantizer covers, None before calibration. note: why something is not
    quantized, or that values are only moved.
    """

    name: str
    kind: str
    weight_bits: int | None
    weight_scales: int | None
    bn: str
    activation: str
    act_bits: int | None
    unsigned: bool | None
    range: tuple[float, float] | None
    note: str
    per_channel: bool | None = None
    weight_grid: str | None = None
    mirrored: int | None = None


@torch.no_grad()
def list_layers(sim: nn.Module) -> tuple[LayerRow, ...]:
    """Every operation of a simulation that gives floating-point values, in order of execution; ``sim`` is unchanged.

    A layer, the BN that folds into it and the activation behind it are one row. Raises ``UserError`` for a module that
    is no simulation, or is folded.
    """
    if parts := parts_of(sim):
        return tuple(row for part, network in parts.items() for row in _rows(network, part))
    return tuple(_rows(sim, ""))


def _rows(sim: nn.Module, part: str) -> list[LayerRow]:
    report = sim_report(sim)
    if not isinstance(sim, fx.GraphModule):
        raise TypeError(f"expected a graph, got a {type(sim).__name__}")
    if "fold_report" in sim.meta:
        raise UserError("list_layers: this network is folded; list the simulation that it was folded from.")
    notes: dict[str, list[str]] = {}
    for name, reason in report.unquantized:
        notes.setdefault(name, []).append(reason)
    grouping = find_groups(sim)
    group_of = {group.output: group for group in grouping.groups}
    within = {node for group in grouping.groups for node in (*group.inner, group.bn) if node not in group_of}
    rows = []
    for node in sim.graph.nodes:
        is_operation = node.op == "placeholder" or node.op.startswith("call_")
        if not is_operation or not node.meta.get("is_float") or node in within:
            continue
        if isinstance(module_of(node), ActivationQuantizer):
            continue
        group = group_of.get(node)
        if group is None:
            bn = f"kept: {grouping.kept[str(node.target)]}" if is_bn(node) and node.target in grouping.kept else ""
            rows.append(_row(node, node, bn, "", notes, part))
        else:
            into = named(part, str(group.layer.target))
            bn = "" if group.bn is None else f"{named(part, str(group.bn.target))} folded into {into}"
            activation = "" if group.activation is None else named(part, names_of(group.activation)[0])
            rows.append(_row(group.layer, node, bn, activation, notes, part))
    return rows


def _row(
    node: fx.Node, output: fx.Node, bn: str, activation: str, notes: Mapping[str, list[str]], part: str
) -> LayerRow:
    name, module = names_of(node)[0], module_of(node)
    weight = getattr(getattr(module, "parametrizations", None), "weight", [None])[0]
    quantizer = next((q for q in map(module_of, output.users) if isinstance(q, ActivationQuantizer)), None)
    has_weight = isinstance(weight, WeightQuantizer)
    reasons = list(notes.get(name, ()))
    following = sole_user(output)
    if quantizer is None and not reasons and node is output and is_preserving(output):
        reasons.append("moves or selects values")
    elif quantizer is None and not reasons and is_relu_like(following):
        reasons.append(f"quantized after {named(part, names_of(following)[0])}")
    return LayerRow(
        name=named(part, name),
        kind=_kind(node),
        weight_bits=weight.bits if has_weight else None,
        weight_scales=weight.scale.numel() if has_weight else None,
        bn=bn,
        activation=activation,
        act_bits=None if quantizer is None else quantizer.bits,
        unsigned=None if quantizer is None else quantizer.unsigned,
        range=None if quantizer is None else _range(quantizer),
        note="; ".join(reasons),
        per_channel=weight.per_channel if has_weight else None,
        weight_grid=(FULL if weight.full_grid else NARROW) if has_weight else None,
        mirrored=int(weight.mirrored.sum()) if has_weight else None,
    )


def _kind(node: fx.Node) -> str:
    module = module_of(node)
    if module is None:
        return "input" if node.op == "placeholder" else getattr(node.target, "__name__", str(node.target))
    return type(module).__name__.removeprefix("Parametrized")


def _range(quantizer: ActivationQuantizer) -> tuple[float, float] | None:
    if not quantizer.has_range:
        return None
    scale, zero_point = float(positive(quantizer.scale)), float(quantizer.grid_zero_point())
    return (0 - zero_point) * scale, (quantizer.quant_max - zero_point) * scale
