"""A quantization simulation: what it does not do, its quantizers, and how to switch them off for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import fx, nn

from bnre_exp.errors import UserError
from bnre_exp.quantsim.part_rules import joined_scheme
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer, WeightQuantizer
from bnre_exp.quantsim.quantizers.scheme import QuantScheme
from bnre_exp.quantsim.whole import named, parts_of

CONTAINER = "act_quantizers"  # submodule of a simulation that holds its activation quantizers, by node name


@dataclass(frozen=True)
class SimReport:
    """What a simulation does not do, as ``(name, reason)``: quantizers left out, BNs of the original that are gone.

    frozen_bns: BNs that their user froze; they normalize by their running statistics in training mode, too.
    weight_notes: what the values of the weights led to, whereas ``notes`` hold for any weights. modes:
    "same": one graph is that of both modes; "both": each has its own; "eval": for evaluation alone. parts: of a network
    that is simulated in parts, the report of each by its name; all else is then of all parts together.
    """

    scheme: QuantScheme
    unquantized: tuple[tuple[str, str], ...]
    unreached_bns: tuple[str, ...]
    notes: tuple[str, ...]
    frozen_bns: tuple[str, ...] = ()
    modes: str = "same"
    parts: Mapping[str, SimReport] | None = None
    weight_notes: tuple[str, ...] = ()

    @property
    def modes_by_part(self) -> dict[str, str]:
        """The modes by part; of a network that is none in parts, under the empty name."""
        return {name: part.modes for name, part in ({"": self} if self.parts is None else self.parts).items()}


def sim_report(sim: nn.Module) -> SimReport:
    """The report of a simulation. Raises ``UserError`` for any other module."""
    if parts := parts_of(sim):
        return _joined({name: sim_report(part) for name, part in parts.items()})
    report = getattr(sim, "meta", {}).get("bnre_exp") if isinstance(sim, fx.GraphModule) else None
    if not isinstance(report, SimReport):
        raise UserError(f"Expected a network that quantize() returned, got {type(sim).__name__}.")
    return report


def graphs_of(sim: nn.Module) -> dict[str, fx.GraphModule]:
    """The graphs of a simulation or folded network: itself, under the empty name, or those of its parts."""
    return {"": sim} if isinstance(sim, fx.GraphModule) else parts_of(sim)


def _joined(parts: Mapping[str, SimReport]) -> SimReport:
    def rows(field: str) -> tuple[tuple[str, str], ...]:
        return tuple(
            (named(part, name), reason) for part, report in parts.items() for name, reason in getattr(report, field)
        )

    def names(field: str) -> tuple[str, ...]:
        return tuple(named(part, name) for part, report in parts.items() for name in getattr(report, field))

    def notes(field: str) -> tuple[str, ...]:
        return tuple(f"{part}: {note}" for part, report in parts.items() for note in getattr(report, field))

    found = {report.modes for report in parts.values()}
    modes = next((mode for mode in ("eval", "both") if mode in found), "same")
    scheme = joined_scheme({part: report.scheme for part, report in parts.items()})
    return SimReport(
        scheme, rows("unquantized"), names("unreached_bns"), notes("notes"), names("frozen_bns"), modes, dict(parts),
        notes("weight_notes"),
    )  # fmt: skip


def names_of(*nodes: fx.Node | None) -> tuple[str, ...]:
    """The names by which overrides and reports know operations: module paths, and node names of functions."""
    return tuple(str(n.target) if n.op in ("call_module", "get_attr") else n.name for n in nodes if n is not None)


def activation_quantizers(sim: nn.Module) -> dict[str, ActivationQuantizer]:
    """All activation quantizers of a simulation or folded network by module name, in order of execution."""
    return {name: module for name, module in sim.named_modules() if isinstance(module, ActivationQuantizer)}


def weight_quantizers(sim: nn.Module) -> dict[str, WeightQuantizer]:
    """All weight quantizers by the name of their layer."""
    suffix = ".parametrizations.weight.0"
    found = {name: module for name, module in sim.named_modules() if isinstance(module, WeightQuantizer)}
    return {name.removesuffix(suffix): module for name, module in found.items()}


@contextmanager
def bypassed(sim: nn.Module, *, activations: bool = True, weights: bool = False) -> Iterator[None]:
    """Within the block, activation (and weight) quantizers pass their input through; restored afterwards."""
    chosen: list[ActivationQuantizer | WeightQuantizer] = []
    chosen += list(activation_quantizers(sim).values()) if activations else []
    chosen += list(weight_quantizers(sim).values()) if weights else []
    with _switched(chosen, True):
        yield


@contextmanager
def in_use(sim: nn.Module) -> Iterator[None]:
    """Within the block, activation quantizers quantize, also where a block around it bypasses them."""
    with _switched(list(activation_quantizers(sim).values()), False):
        yield


@contextmanager
def _switched(quantizers: Sequence[ActivationQuantizer | WeightQuantizer], is_bypassed: bool) -> Iterator[None]:
    before = [quantizer.bypassed for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.bypassed = is_bypassed
    try:
        yield
    finally:
        for quantizer, was in zip(quantizers, before):
            quantizer.bypassed = was
