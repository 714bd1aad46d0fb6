"""A network traced in its modes, and checked against the original in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from bnre_exp.errors import UserError, first_line
from bnre_exp.quantsim.tracing.modes import where_they_part
from bnre_exp.quantsim.tracing.network import EVALUATION_ALONE, TracedNetwork
from bnre_exp.quantsim.tracing.same_behaviour import Comparison
from bnre_exp.quantsim.tracing.trace import trace

BOTH, EVALUATION, SAME = "both", "eval", "same"


@dataclass(frozen=True)
class Tracing:
    """A traced network; notes on it; modes: "same": one graph is that of both modes; "both": each has its own; "eval":
    what it does in training mode is not traced."""

    network: TracedNetwork
    notes: tuple[str, ...]
    modes: str


def traced_and_checked(modes: str, model: nn.Module, inputs: Sequence[Tensor], leaf_modules: Sequence[str]) -> Tracing:
    """Trace the network: once, if that is right in both modes, else for each; where that fails and modes is "eval", for
    evaluation alone.

    Raises ``UserError`` if it cannot be traced, or behaves differently then.
    """
    network, decisions = trace(model, inputs, leaf_modules)
    comparison = Comparison(model, network, inputs)
    comparison.check(training=False)
    try:
        comparison.check(training=True)
    except UserError as difference:
        return _by_mode(modes, model, inputs, leaf_modules, difference)
    return Tracing(network, comparison.notes + _as_notes(decisions), SAME)


def traced_again(modes: str, model: nn.Module, inputs: Sequence[Tensor], leaf_modules: Sequence[str]) -> Tracing:
    """Trace a network that was traced before, whose ``modes`` were found then."""
    if modes == EVALUATION:
        return _evaluation_alone(model, inputs, leaf_modules, "as was found before")
    network, decisions = trace(model, inputs, leaf_modules, by_mode=modes == BOTH)
    return Tracing(network, _as_notes(decisions), modes)


def _by_mode(
    modes: str, model: nn.Module, inputs: Sequence[Tensor], leaf_modules: Sequence[str], difference: UserError
) -> Tracing:
    """The network whose training mode is not what the graph of its evaluation mode says."""
    try:
        network, decisions = trace(model, inputs, leaf_modules, by_mode=True)
        comparison = Comparison(model, network, inputs)
        comparison.check(training=False)
        comparison.check(training=True)
    except UserError as error:
        if modes == EVALUATION:
            return _evaluation_alone(model, inputs, leaf_modules, first_line(difference))
        raise UserError(
            f"In training mode the network does something else than in evaluation mode, and that cannot be traced: "
            f'{error} (Without QAT that does not matter: quantize(..., modes="eval"), in a job qat=off.)'
        ) from error
    where = where_they_part(network.graph, _training_graph(network))
    note = f"training mode has a graph of its own: {where}" if where else "training mode has a graph of its own"
    return Tracing(network, (note, *_as_notes(decisions)), BOTH)


def _evaluation_alone(model: nn.Module, inputs: Sequence[Tensor], leaf_modules: Sequence[str], why: str) -> Tracing:
    try:  # what evaluation makes of the outputs of training mode is known then
        network, decisions = trace(model, inputs, leaf_modules, by_mode=True)
        why = where_they_part(network.graph, _training_graph(network)) or why
        network.training_graph = None
        network.recompile()
    except UserError:
        network, decisions = trace(model, inputs, leaf_modules)
    network.meta[EVALUATION_ALONE] = why
    note = f"taken for evaluation alone, since training mode does something else: {why}"
    return Tracing(network, (note, *_as_notes(decisions)), EVALUATION)


def _training_graph(network: TracedNetwork) -> fx.Graph:
    if network.training_graph is None:
        raise RuntimeError("traced by mode, without a graph of training mode")
    return network.training_graph


def _as_notes(decisions: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"decided by the input's size: {line}" for line in decisions)
