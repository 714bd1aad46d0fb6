"""From a float network to its quantization simulation: traced, recorded, and given quantizers where they are placed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp.errors import UserError
from bnre_exp.quantsim.admission import admitted, inputs_of, refuse_kind
from bnre_exp.quantsim.groups import find_groups
from bnre_exp.quantsim.node_facts import record
from bnre_exp.quantsim.part_rules import PartRules, leaves_of_parts
from bnre_exp.quantsim.parts import by_parts, check_names
from bnre_exp.quantsim.placement import ActivationPlacement, place_quantizers
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer
from bnre_exp.quantsim.quantizers.scheme import QuantScheme
from bnre_exp.quantsim.sim import CONTAINER, SimReport, graphs_of, names_of, sim_report
from bnre_exp.quantsim.tracing.frozen import META
from bnre_exp.quantsim.tracing.modes import counterparts
from bnre_exp.quantsim.tracing.network import EVALUATION_ALONE, TracedNetwork
from bnre_exp.quantsim.tracing.same_behaviour import Comparison
from bnre_exp.quantsim.tracing.whole import BOTH, EVALUATION, SAME, Tracing, traced_again, traced_and_checked
from bnre_exp.quantsim.weights import quantize_weights
from bnre_exp.quantsim.wrappers import unwrapped

logger = logging.getLogger(__name__)

Trace = Callable[[nn.Module, Sequence[Tensor], Sequence[str]], Tracing]


def quantize(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    scheme: QuantScheme | None = None,
    *,
    leaf_modules: Sequence[str] = (),
    modes: str = BOTH,
    submodules: Sequence[str] = (),
) -> Any:
    """Return a quantization simulation of a copy of ``model``; weight ranges are fitted, activation ranges are not yet.

    example_input: one batch ``[N, ...]`` as the model takes it, or a tuple of its inputs. BN stays as it is.
    submodules: names of the parts that are simulated, each traced by itself, with the arguments that it has in the
    network; a copy of the whole network, of its own class, is returned with them in it, and goes on working as before
    (detectors, whose choice of boxes cannot be traced: ``["backbone", "head"]``). The example is then whatever the
    network takes: a tuple of its arguments, a dict of them by name, or its only one. None: the whole network, as an
    ``fx.GraphModule``.
    leaf_modules: names or class names of modules that are kept whole (their weights stay in floating point).
    A network that does something else in training mode than in evaluation mode is traced in each, and each graph is
    used in its mode; what evaluation makes of that which training mode returns (boxes, probabilities) stays in floating
    point. modes: "both": a network whose training mode cannot be traced is refused; "eval": it is taken for evaluation
    alone, and its simulation cannot be trained.
    A network that is wrapped (data parallel, compiled, averaged) is taken out of its wrapper, and the report says so.
    Modules in evaluation mode within a network in training mode (a BN that is frozen, above all), and those that the
    network's own ``train`` keeps in it, stay in it whenever the simulation is trained; the report and a warning name
    such BNs. Re-estimation, being asked for, gives them new statistics as it does all others.

    Raises ``UserError`` if ``model`` is nothing that can be quantized (a simulation, TorchScript, an exported program,
    tensors that are pruned, lazy, without values or in half precision), if the network cannot be traced, if its traced
    form behaves differently at either of two batch sizes, in evaluation or (modes="both") training mode, or if an
    override matches nothing.
    """
    if modes not in (BOTH, EVALUATION):
        raise UserError(f"modes={modes!r}: expected {BOTH!r} or {EVALUATION!r}.")
    how = _How(leaf_modules, tuple(submodules), lambda _: partial(traced_and_checked, modes))
    sim = _build(model, example_input, scheme or QuantScheme(), how)
    frozen = sim_report(sim).frozen_bns
    if frozen:
        logger.warning(
            "quantize: %d batch norms stay frozen when the simulation is trained, as they are in the network (%s%s)",
            len(frozen), ", ".join(frozen[:3]), ", ..." if len(frozen) > 3 else "",
        )  # fmt: skip
    return sim


def quantize_again(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    scheme: QuantScheme,
    before: SimReport,
    *,
    leaf_modules: Sequence[str] = (),
) -> Any:
    """As :func:`quantize`, for a network that it has taken before with other weights: that its traced form behaves like
    it is not checked again. before: the report of then, whose notes hold."""
    parts = {"": before} if before.parts is None else before.parts
    how = _How(leaf_modules, tuple(before.parts or ()), lambda name: partial(traced_again, parts[name].modes))
    sim = _build(model, example_input, scheme, how)
    for name, network in graphs_of(sim).items():
        network.meta["bnre_exp"] = replace(sim_report(network), notes=parts[name].notes)
    return sim


def rebuild_sim(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    scheme: QuantScheme,
    *,
    leaf_modules: Sequence[str] = (),
    modes: str | Mapping[str, str] = SAME,
) -> Any:
    """The simulation that :func:`quantize` returns, for a state dict to be loaded into: its ranges mean nothing, and
    what :func:`quantize` checked when that state was made is not checked again. modes: as in its report,
    by part where it was in parts (``modes_by_part``)."""
    quick = replace(scheme, weight_range="minmax")
    known = {"": modes} if isinstance(modes, str) else modes
    how = _How(leaf_modules, tuple(filter(None, known)), lambda name: partial(traced_again, known[name]))
    sim = _build(model, example_input, quick, how)
    for network in graphs_of(sim).values():
        report = sim_report(network)
        given = replace(report.scheme, weight_range=scheme.weight_range)
        network.meta["bnre_exp"] = replace(report, scheme=given, weight_notes=())
    return sim


@dataclass(frozen=True)
class _How:
    """How a network is traced. tracing: of the part of a name, or of the network, whose name is empty."""

    leaf_modules: Sequence[str]
    submodules: tuple[str, ...]
    tracing: Callable[[str], Trace]


@torch.inference_mode(False)  # the simulation is trained later, of whatever mode its maker was in
def _build(model: nn.Module, example_input: Any, scheme: QuantScheme, how: _How) -> Any:
    if not how.submodules:
        return _build_graph(model, example_input, lambda _: scheme, how.leaf_modules, how.tracing(""))
    model = unwrapped(model)
    refuse_kind(model, "quantize")
    rules = PartRules(scheme, how.submodules)
    check_names(model, how.submodules)
    floats = {name: model.get_submodule(name) for name in how.submodules}
    leaves = leaves_of_parts(how.leaf_modules, floats)

    def build(name: str, part: nn.Module, calls: Sequence[tuple[Tensor, ...]]) -> fx.GraphModule:
        with _in_part(name):
            of_part = partial(rules.of_part, name)
            return _build_graph(part, calls[0], of_part, leaves[name], _for_all(calls[1:], how.tracing(name)))

    for name, part in floats.items():
        with _in_part(name):
            admitted(part, leaves[name])
    whole = by_parts(model, example_input, how.submodules, build)
    rules.check_used()
    return whole


@contextmanager
def _in_part(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        said = str(error).replace("leaf_modules=['", f"leaf_modules=['{name}.")  # by the names of the whole network
        raise UserError(f"submodules: {name}: {said}") from error


def _for_all(calls: Sequence[tuple[Tensor, ...]], trace: Trace) -> Trace:
    """As ``trace``, which looks at one call of a part; its graph has to be right for inputs of other shapes, too."""

    def tracing(model: nn.Module, inputs: Sequence[Tensor], leaf_modules: Sequence[str]) -> Tracing:
        traced = trace(model, inputs, leaf_modules)
        for others in calls:
            comparison = Comparison(model, traced.network, others)
            for training in (False, True) if traced.modes != EVALUATION else (False,):
                comparison.check(training)
        return traced

    return tracing


def _build_graph(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    scheme_of: Callable[[AbstractSet[str]], QuantScheme],
    leaf_modules: Sequence[str],
    tracing: Trace,
) -> fx.GraphModule:
    """scheme_of: gives the scheme, for the names of all operations."""
    model, notes = admitted(model, leaf_modules)
    inputs = inputs_of(example_input)
    traced = tracing(model, inputs, leaf_modules)
    sim = traced.network
    notes += traced.notes
    record(sim, inputs)
    scheme = scheme_of({name for node in sim.graph.nodes if node.meta.get("is_float") for name in names_of(node)})
    grouping = find_groups(sim)
    placement = place_quantizers(model, sim, grouping, scheme)
    _insert_activation_quantizers(sim, placement.activations, scheme)
    weight_notes = quantize_weights(sim, grouping, placement.weights, scheme)
    sim.graph.lint()
    sim.recompile()
    bns = [name for name, module in sim.named_modules() if isinstance(module, _BatchNorm)]
    sim.meta["bnre_exp"] = SimReport(
        scheme, placement.unquantized, placement.unreached_bns, notes, tuple(n for n in bns if n in sim.meta[META]),
        traced.modes, weight_notes=weight_notes,
    )  # fmt: skip
    for node in sim.graph.nodes:
        if node.op == "call_module" and node.target in grouping.kept:
            node.meta["kept_reason"] = grouping.kept[node.target]
    return sim.train(model.training and EVALUATION_ALONE not in sim.meta)


def _insert_activation_quantizers(
    sim: TracedNetwork, placed: Sequence[ActivationPlacement], scheme: QuantScheme
) -> None:
    if hasattr(sim, CONTAINER):
        raise UserError(f"The network has an attribute {CONTAINER!r}, which the simulation needs; rename it.")
    reference = next((p for p in sim.parameters() if p.is_floating_point()), None)
    container = nn.Module()
    sim.add_submodule(CONTAINER, container)
    for place in placed:
        quantizer = ActivationQuantizer(place.bits, place.unsigned, scheme.range_learning, label=place.label)
        container.add_module(place.node.name, quantizer)
        in_training = [] if sim.training_graph is None else counterparts(sim.training_graph, place.node.name)
        for node in (place.node, *in_training):
            _insert_after(node, f"{CONTAINER}.{place.node.name}")
    if reference is not None:
        container.to(reference.device)


def _insert_after(node: fx.Node, target: str) -> None:
    with node.graph.inserting_after(node):
        new = node.graph.call_module(target, ())
    node.replace_all_uses_with(new)
    new.args = (node,)
    new.meta.update({key: node.meta[key] for key in ("is_float", "is_single", "ndim") if key in node.meta})
