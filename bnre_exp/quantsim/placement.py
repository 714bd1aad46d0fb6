"""Where quantizers go: decided from a recorded graph, its groups and the scheme, and nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx, nn

from bnre_exp.errors import UserError
from bnre_exp.quantsim.groups import Grouping
from bnre_exp.quantsim.nodes import is_layer, is_relu_like, module_of, sole_user, source_of
from bnre_exp.quantsim.operations import is_nonnegative, is_preserving
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, LAYERS
from bnre_exp.quantsim.quantizers.scheme import LayerRule, QuantScheme
from bnre_exp.quantsim.sim import names_of
from bnre_exp.quantsim.tracing.modes import AFTER_NETWORK

MADE_OF_OUTPUTS = "computed in evaluation mode only, of what the network gives in training mode; stays float"
READ_DIRECTLY = "a constant or parameter that the graph reads directly"

Rows = list[tuple[str, str]]  # (name, reason) of what is not quantized


@dataclass(frozen=True)
class ActivationPlacement:
    """The output of ``node`` gets a quantizer. label: the operation's name; unsigned: it is never negative."""

    node: fx.Node
    label: str
    bits: int
    unsigned: bool


@dataclass(frozen=True)
class WeightPlacement:
    """The weight of the layer ``name`` gets a quantizer."""

    name: str
    bits: int


@dataclass(frozen=True)
class Placement:
    """All quantizers of a simulation, and what has none. activations, weights: in order of execution; unquantized:
    ``(name, reason)`` of what is not quantized; unreached_bns: BNs of the model that its forward pass does not use.
    """

    activations: tuple[ActivationPlacement, ...]
    weights: tuple[WeightPlacement, ...]
    unquantized: tuple[tuple[str, str], ...]
    unreached_bns: tuple[str, ...]


def place_quantizers(model: nn.Module, graph: fx.GraphModule, grouping: Grouping, scheme: QuantScheme) -> Placement:
    """Decide for the recorded ``graph``, which was traced from ``model``.

    Raises ``UserError`` for an override that matches nothing or cannot do what it asks for.
    """
    _check_overrides(graph, grouping, scheme)
    edges = _first_and_last(grouping) if scheme.first_last_bits is not None else set()
    activations, rows, tensors = _place_activations(graph, grouping, scheme, edges)
    weights, switched_off = _place_weights(graph, grouping, scheme, edges)
    _check_effects(scheme, tensors, layers=[str(group.layer.target) for group in grouping.groups])
    unreached = _unreached(model, graph)
    rows += switched_off
    if scheme.weight_bits is not None:
        rows += _other_weights(graph)
        dropped = [name for name, module in unreached.items() if isinstance(module, LAYERS)]
        rows += [(name, "never reached by the forward pass; dropped") for name in dropped]
    bns = sorted(name for name, module in unreached.items() if isinstance(module, BATCH_NORMS))
    return Placement(tuple(activations), tuple(weights), tuple(dict.fromkeys(rows)), tuple(bns))


def _place_activations(
    graph: fx.GraphModule, grouping: Grouping, scheme: QuantScheme, edges: set[fx.Node]
) -> tuple[list[ActivationPlacement], Rows, list[tuple[str, ...]]]:
    """Quantizers, what has none, and the names of every tensor that has one, or would have."""
    placed: list[ActivationPlacement] = []
    rows: Rows = []
    tensors: list[tuple[str, ...]] = []
    unsigned: dict[fx.Node, bool] = {}
    for node, names in _operations(graph, grouping):
        rule, reason = scheme.rule(names), _why_no_quantizer(node, scheme)
        if reason is None:
            tensors.append(names)
            reason = _switched_off(rule)
        bits = _act_bits(scheme, rule, is_edge=node in edges)
        if reason:
            rows.append((names[0], reason))
        elif reason is None and bits is not None:
            unsigned[node] = is_nonnegative(node, unsigned)
            placed.append(ActivationPlacement(node, names[0], bits, unsigned[node]))
    return placed, rows, tensors


def _operations(graph: fx.GraphModule, grouping: Grouping) -> Iterator[tuple[fx.Node, tuple[str, ...]]]:
    """Every node whose value leaves its operation, with the names by which overrides know the operation."""
    inner = {node for group in grouping.groups for node in group.inner}
    inner |= {group.bn for group in grouping.groups if group.bn is not None and group.bn_before}
    group_of = {group.output: group for group in grouping.groups}
    for node in graph.graph.nodes:
        if not node.meta.get("is_float") or node.op == "output" or node in inner:
            continue
        group = group_of.get(node)
        names = names_of(group.layer, group.bn, group.activation) if group else names_of(node)
        if group is None and is_relu_like(node) and _is_sole_relu_of_an_operation(node):
            names = (*names, *names_of(source_of(node)))
        yield node, names


def _why_no_quantizer(node: fx.Node, scheme: QuantScheme) -> str | None:
    """None: it gets one. "": it needs none. Otherwise why it goes without, in words."""
    if node.meta.get(AFTER_NETWORK):
        return MADE_OF_OUTPUTS
    if is_preserving(node):
        fresh_relu = is_relu_like(node) and _is_sole_relu_of_an_operation(node)
        return None if fresh_relu else ""
    if is_relu_like(sole_user(node)) and not is_preserving(node):
        return ""  # the quantizer comes after the activation
    if node.meta.get("is_constant"):
        return "" if node.op != "get_attr" or scheme.act_bits is None else READ_DIRECTLY
    if node.meta.get("is_empty"):
        return "a tensor without elements"
    if not node.meta.get("is_single"):
        return "an operation with several outputs"
    return None


def _is_sole_relu_of_an_operation(node: fx.Node) -> bool:
    source = source_of(node)
    return isinstance(source, fx.Node) and sole_user(source) is node and not is_preserving(source)


def _act_bits(scheme: QuantScheme, rule: LayerRule | None, is_edge: bool) -> int | None:
    if rule and rule.act_bits:
        return rule.act_bits
    return scheme.first_last_bits if is_edge and scheme.act_bits is not None else scheme.act_bits


def _switched_off(rule: LayerRule | None) -> str | None:
    return f"switched off by the override {rule.pattern!r}" if rule and rule.off else None


def _place_weights(
    graph: fx.GraphModule, grouping: Grouping, scheme: QuantScheme, edges: set[fx.Node]
) -> tuple[list[WeightPlacement], Rows]:
    placed: list[WeightPlacement] = []
    rows: Rows = []
    first_calls: dict[str, fx.Node] = {}
    for group in grouping.groups:
        first_calls.setdefault(str(group.layer.target), group.layer)
    for name, node in first_calls.items():
        rule = scheme.rule(names_of(node))
        bits = scheme.first_last_bits if node in edges and scheme.weight_bits else scheme.weight_bits
        bits = rule.weight_bits if rule and rule.weight_bits else bits
        reason = MADE_OF_OUTPUTS if node.meta.get(AFTER_NETWORK) else _switched_off(rule)
        if reason:
            rows.append((name, reason))
        elif bits is not None:
            placed.append(WeightPlacement(name, bits))
    return placed, rows


def _other_weights(graph: fx.GraphModule) -> Rows:
    """Weights that are not those of plain layers, which stay in floating point."""
    rows: Rows = []
    for node in graph.graph.nodes:
        module = module_of(node)
        if module is None or isinstance(module, BATCH_NORMS) or is_layer(node):
            continue
        name, kind = str(node.target), type(module).__name__
        layers = [m for m in module.modules() if isinstance(m, LAYERS)]
        if isinstance(module, LAYERS):
            rows.append((name, f"{kind} does not simply multiply with its weight; stays float"))
        elif layers:
            rows.append((name, f"kept whole; its {len(layers)} conv or linear weights stay float"))
        elif any(True for _ in module.parameters()):
            rows.append((name, f"the weights of {kind} stay float"))
    read = [node for node in graph.graph.find_nodes(op="get_attr") if node.meta.get("is_float")]
    return rows + [(str(node.target), READ_DIRECTLY) for node in read]


def _unreached(model: nn.Module, graph: fx.GraphModule) -> dict[str, nn.Module]:
    """Layers and BNs of the model that the graph neither calls, nor reads, nor keeps inside a leaf."""
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    called |= {str(node.target).rpartition(".")[0] for node in graph.graph.find_nodes(op="get_attr")}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, (*LAYERS, *BATCH_NORMS))}
    return {
        name: module
        for name, module in modules.items()
        if name not in called and not any(name.startswith(f"{leaf}.") for leaf in called)
    }


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


def _check_overrides(graph: fx.GraphModule, grouping: Grouping, scheme: QuantScheme) -> None:
    names = {name for node in graph.graph.nodes if node.meta.get("is_float") for name in names_of(node)}
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
