"""Where quantizers go: from a float network to its quantization simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError
from bnre_exp.quantsim.groups import Grouping, find_groups
from bnre_exp.quantsim.node_facts import record
from bnre_exp.quantsim.nodes import is_layer, is_relu_like, module_of, sole_user, source_of
from bnre_exp.quantsim.operations import is_nonnegative, is_preserving
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, LAYERS, layout_of
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer, WeightQuantizer, narrow_quant_max
from bnre_exp.quantsim.quantizers.ranges import fit_symmetric_scale
from bnre_exp.quantsim.quantizers.scheme import QuantScheme
from bnre_exp.quantsim.sim import CONTAINER, SimReport, names_of, sim_report
from bnre_exp.quantsim.tracing.same_behaviour import check_same_behaviour
from bnre_exp.quantsim.tracing.trace import trace

READ_DIRECTLY = "a constant or parameter that the graph reads directly"


def quantize(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    scheme: QuantScheme | None = None,
    *,
    leaf_modules: Sequence[str] = (),
) -> fx.GraphModule:
    """Return a quantization simulation of a copy of ``model``; weight ranges are fitted, activation ranges are not yet.

    example_input: one batch ``[N, ...]`` as the model takes it, or a tuple of its inputs. BN stays as it is.
    leaf_modules: names or class names of modules that are kept whole (their weights stay in floating point).

    Raises ``UserError`` if the network cannot be traced, if its traced form behaves differently in evaluation or
    training mode at either of two batch sizes, or if an override matches nothing.
    """
    sim = _build(model, _inputs(example_input), scheme or QuantScheme(), leaf_modules, is_checked=True)
    return sim.train(model.training)


def rebuild_sim(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    scheme: QuantScheme,
    *,
    leaf_modules: Sequence[str] = (),
) -> fx.GraphModule:
    """The simulation that :func:`quantize` returns, for a state dict to be loaded into: its ranges mean nothing, and
    what :func:`quantize` checked when that state was made is not checked again."""
    sim = _build(model, _inputs(example_input), replace(scheme, weight_range="minmax"), leaf_modules, is_checked=False)
    sim.meta["bnre_exp"] = replace(sim_report(sim), scheme=scheme)
    return sim.train(model.training)


def _inputs(example_input: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    if not inputs or not all(isinstance(x, Tensor) and x.dim() > 0 and len(x) for x in inputs):
        raise UserError("example_input: expected a tensor [N, ...] with N >= 1, or a non-empty tuple of tensors.")
    return inputs


def _build(
    model: nn.Module, inputs: tuple[Tensor, ...], scheme: QuantScheme, leaf_modules: Sequence[str], is_checked: bool
) -> fx.GraphModule:
    sim, decisions = trace(model, inputs, leaf_modules)
    notes = tuple(check_same_behaviour(model, sim, inputs)) if is_checked else ()
    notes += tuple(f"decided by the input's size: {line}" for line in decisions)
    record(sim, inputs)
    grouping = find_groups(sim)
    unquantized = _Unquantized()
    _check_overrides(sim, grouping, scheme)
    edges = _first_and_last(grouping) if scheme.first_last_bits is not None else set()
    tensors = _insert_activation_quantizers(sim, grouping, scheme, edges, unquantized)
    _check_effects(scheme, tensors, layers=_quantize_weights(sim, grouping, scheme, edges, unquantized))
    sim.graph.lint()
    sim.recompile()
    unreached = _unreached(model, sim)
    for name, module in unreached.items():
        if isinstance(module, LAYERS) and scheme.weight_bits is not None:
            unquantized.add(name, "never reached by the forward pass; dropped")
    bns = tuple(sorted(name for name, module in unreached.items() if isinstance(module, BATCH_NORMS)))
    sim.meta["bnre_exp"] = SimReport(scheme, tuple(unquantized.rows), bns, notes)
    for node in sim.graph.nodes:
        if node.op == "call_module" and node.target in grouping.kept:
            node.meta["kept_reason"] = grouping.kept[node.target]
    return sim


def _unreached(model: nn.Module, sim: fx.GraphModule) -> dict[str, nn.Module]:
    """Layers and BNs of the model that the graph neither calls, nor reads, nor keeps inside a leaf."""
    called = {str(node.target) for node in sim.graph.nodes if node.op == "call_module"}
    called |= {str(node.target).rpartition(".")[0] for node in sim.graph.find_nodes(op="get_attr")}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, (*LAYERS, *BATCH_NORMS))}
    return {
        name: module
        for name, module in modules.items()
        if name not in called and not any(name.startswith(f"{leaf}.") for leaf in called)
    }


class _Unquantized:
    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def add(self, name: str, reason: str) -> None:
        if (name, reason) not in self.rows:
            self.rows.append((name, reason))


def _check_overrides(sim: fx.GraphModule, grouping: Grouping, scheme: QuantScheme) -> None:
    names = {name for node in sim.graph.nodes if node.meta.get("is_float") for name in names_of(node)}
    for rule in scheme.overrides:
        if not rule.matches(names):
            layers = [str(group.layer.target) for group in grouping.groups]
            shown = ", ".join(layers[:8]) + (", …" if len(layers) > 8 else "")
            raise UserError(
                f"quant.overrides: the pattern {rule.pattern!r} matches nothing in the network. Its layers are {shown}."
            )


def _check_effects(scheme: QuantScheme, tensors: Sequence[tuple[str, ...]], layers: Sequence[str]) -> None:
    """An override that cannot do what it asks for, as act_bits of a max pooling, is a mistake."""
    for rule in scheme.overrides:
        on_tensor = any(rule.matches(names) for names in tensors)
        asked = [
            ("act_bits", rule.act_bits is not None, on_tensor, "an activation quantizer (these only move values)"),
            ("weight_bits", rule.weight_bits is not None, rule.matches(layers), "a conv or linear weight"),
            ("off", rule.off, on_tensor or rule.matches(layers), "a weight or an activation quantizer"),
        ]
        for field, is_set, has_effect, what in asked:
            if is_set and not has_effect:
                raise UserError(
                    f"quant.overrides: {field} of the pattern {rule.pattern!r} has no effect: nothing that it matches "
                    f"has {what}. layers.md of a run, or list_layers(), shows what does."
                )


def _first_and_last(grouping: Grouping) -> set[fx.Node]:
    """Nodes that first_last_bits applies to: both layers, the tensors they read, and the last one's output."""
    if not grouping.groups:
        return set()
    first, last = grouping.groups[0], grouping.groups[-1]
    nodes = {first.layer, last.layer, last.output}
    for layer in (first.layer, last.layer):
        source = source_of(layer)
        while isinstance(source, fx.Node) and is_preserving(source):
            nodes.add(source)  # a ReLU may be what holds the quantizer
            source = source_of(source)
        if isinstance(source, fx.Node):
            nodes.add(source)
    return nodes


def _insert_activation_quantizers(
    sim: fx.GraphModule, grouping: Grouping, scheme: QuantScheme, edges: set[fx.Node], unquantized: _Unquantized
) -> list[tuple[str, ...]]:
    """Returns the names of every tensor that has a quantizer, or would have one."""
    tensors = []
    inner = {node for group in grouping.groups for node in group.inner}
    inner |= {group.bn for group in grouping.groups if group.bn is not None and group.bn_before}
    group_of = {group.output: group for group in grouping.groups}
    if hasattr(sim, CONTAINER):
        raise UserError(f"The network has an attribute {CONTAINER!r}, which the simulation needs; rename it.")
    reference = next((p for p in sim.parameters() if p.is_floating_point()), None)
    container = nn.Module()
    sim.add_submodule(CONTAINER, container)
    for node in list(sim.graph.nodes):
        if not node.meta.get("is_float") or node.op == "output" or node in inner:
            continue
        group = group_of.get(node)
        names = names_of(group.layer, group.bn, group.activation) if group else names_of(node)
        if group is None and is_relu_like(node) and _is_sole_relu_of_an_operation(node):
            names = (*names, *names_of(source_of(node)))
        reason = _why_no_quantizer(node, scheme)
        rule = scheme.rule(names)
        bits = rule.act_bits if rule and rule.act_bits else scheme.act_bits
        if node in edges and scheme.act_bits is not None and not (rule and rule.act_bits):
            bits = scheme.first_last_bits
        if reason == "":
            continue
        if reason is None:
            tensors.append(names)
        if rule and rule.off and reason is None:
            reason = f"switched off by the override {rule.pattern!r}"
        if reason is not None:
            unquantized.add(names[0], reason)
            continue
        if bits is None:
            continue
        learned = scheme.range_learning
        quantizer = ActivationQuantizer(bits, is_nonnegative(node), learned, label=names[0])
        container.add_module(node.name, quantizer)
        _insert_after(node, f"{CONTAINER}.{node.name}")
    if reference is not None:
        container.to(reference.device)
    return tensors


def _why_no_quantizer(node: fx.Node, scheme: QuantScheme) -> str | None:
    """None: it gets one. "": it needs none. Otherwise why it goes without, in words."""
    if is_preserving(node):
        fresh_relu = is_relu_like(node) and _is_sole_relu_of_an_operation(node)
        return None if fresh_relu else ""
    if is_relu_like(sole_user(node)) and not is_preserving(node):
        return ""  # the quantizer comes after the activation
    if node.meta.get("is_constant"):
        return "" if node.op != "get_attr" or scheme.act_bits is None else READ_DIRECTLY
    if not node.meta.get("is_single"):
        return "an operation with several outputs"
    return None


def _is_sole_relu_of_an_operation(node: fx.Node) -> bool:
    source = source_of(node)
    return isinstance(source, fx.Node) and sole_user(source) is node and not is_preserving(source)


def _insert_after(node: fx.Node, target: str) -> None:
    with node.graph.inserting_after(node):
        new = node.graph.call_module(target, ())
    node.replace_all_uses_with(new)
    new.args = (node,)
    new.meta.update({key: node.meta[key] for key in ("is_float", "is_single", "ndim") if key in node.meta})


def _quantize_weights(
    sim: fx.GraphModule, grouping: Grouping, scheme: QuantScheme, edges: set[fx.Node], unquantized: _Unquantized
) -> list[str]:
    """Returns the names of the layers whose weights are quantized, or would be."""
    done: dict[str, None] = {}
    for group in grouping.groups:
        name = str(group.layer.target)
        if name in done:
            continue
        done[name] = None
        rule = scheme.rule(names_of(group.layer))
        bits = scheme.first_last_bits if group.layer in edges and scheme.weight_bits else scheme.weight_bits
        bits = rule.weight_bits if rule and rule.weight_bits else bits
        if rule and rule.off:
            unquantized.add(name, f"switched off by the override {rule.pattern!r}")
        elif bits is not None:
            _quantize_weight(name, sim.get_submodule(name), bits, scheme)
    if scheme.weight_bits is not None:
        _name_other_weights(sim, unquantized)
    return list(done)


def _quantize_weight(name: str, layer: Any, bits: int, scheme: QuantScheme) -> None:
    if parametrize.is_parametrized(layer, "weight"):
        raise UserError(
            f"The weight of {name} has a parametrization already ({layer.parametrizations.weight[0]}); make it a plain "
            "weight first: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')."
        )
    layout = layout_of(layer)
    weight: Tensor = layer.weight
    rows = layout.rows(weight, scheme.per_channel)
    scale = fit_symmetric_scale(rows, narrow_quant_max(bits), scheme.weight_range, scheme.percentile)
    quantizer = WeightQuantizer(bits, layout, scale, scheme.range_learning)
    parametrize.register_parametrization(layer, "weight", quantizer)


def _name_other_weights(sim: fx.GraphModule, unquantized: _Unquantized) -> None:
    for node in sim.graph.nodes:
        module = module_of(node)
        if module is None or isinstance(module, (*BATCH_NORMS, ActivationQuantizer)) or is_layer(node):
            continue
        layers = [m for m in module.modules() if isinstance(m, LAYERS)]
        kind = type(module).__name__
        if isinstance(module, LAYERS):
            unquantized.add(
                str(node.target),
                f"{kind} does not simply multiply with its weight; stays float",
            )
        elif layers:
            unquantized.add(str(node.target), f"kept whole; its {len(layers)} conv or linear weights stay float")
        elif any(True for _ in module.parameters()):
            unquantized.add(str(node.target), f"the weights of {kind} stay float")
    for node in sim.graph.find_nodes(op="get_attr"):
        if node.meta.get("is_float"):
            unquantized.add(str(node.target), READ_DIRECTLY)
