"""A quantization simulation: what it does not do, its quantizers, and how to switch them off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import fx, nn

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer, WeightQuantizer
from bnre_exp.quantsim.quantizers.scheme import QuantScheme

CONTAINER = "act_quantizers"  # submodule of a simulation that holds its activation quantizers, by node name


@dataclass(frozen=True)
class SimReport:
    """What a simulation does not do, as ``(name, reason)``: quantizers left out, BNs of the original that are gone.

    frozen_bns: BNs that their user froze; they normalize by their running statistics in training mode, too. modes:
    "same": one graph is that of both modes; "both": each has its own; "eval": for evaluation alone.
    """

    scheme: QuantScheme
    unquantized: tuple[tuple[str, str], ...]
    unreached_bns: tuple[str, ...]
    notes: tuple[str, ...]
    frozen_bns: tuple[str, ...] = ()
    modes: str = "same"


def sim_report(sim: nn.Module) -> SimReport:
    """The report of a simulation. Raises ``UserError`` for any other module."""
    report = getattr(sim, "meta", {}).get("bnre_exp") if isinstance(sim, fx.GraphModule) else None
    if not isinstance(report, SimReport):
        raise UserError(f"Expected a network that quantize() returned, got {type(sim).__name__}.")
    return report


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
    before = [quantizer.bypassed for quantizer in chosen]
    for quantizer in chosen:
        quantizer.bypassed = True
    try:
        yield
    finally:
        for quantizer, was in zip(chosen, before):
            quantizer.bypassed = was
