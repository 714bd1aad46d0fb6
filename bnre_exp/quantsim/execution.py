"""How the graph of a simulation is executed: a quantizer takes in the ReLU before it, and what nobody else reads is
overwritten. (Networks do so themselves, by ``inplace=True``, which tracing takes from them.)"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnre_exp.quantsim.nodes import module_of, sole_user, source_of
from bnre_exp.quantsim.quantizers.quantizer import (
    ACTIVATIONS,
    ALLOCATING,
    RELUS,
    ActivationQuantizer,
    is_own,
    is_watched,
)

ALLOCATING_CALLS = {operator.add, operator.mul, torch.add, torch.mul, "add", "mul"}
IN_PLACE: dict[type, Callable[..., Tensor]] = {
    nn.ReLU: F.relu,
    nn.ReLU6: F.relu6,
    nn.SiLU: F.silu,
    nn.Hardswish: F.hardswish,
    nn.Hardsigmoid: F.hardsigmoid,
}


def executed_graph(network: fx.GraphModule) -> fx.Graph:
    """A copy of the network's graph in which quantizers are called by :meth:`ActivationQuantizer.after`, where
    something is gained by that. The graph itself stays what is analysed, folded and exported."""
    graph = fx.Graph(owning_module=network)
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(network.graph, copies))
    graph.set_codegen(network.graph._codegen)
    taken_in: set[fx.Node] = set()
    for node in reversed(network.graph.nodes):
        if isinstance(module_of(node), ActivationQuantizer):
            source = source_of(node)
            is_taken_in = type(module_of(source)) in RELUS and sole_user(source) is node
            relu = source if is_taken_in else None
            taken_in |= {source} if is_taken_in else set()
            _replace(node, source_of(source) if is_taken_in else source, relu, graph, copies)
        elif type(module_of(node)) in IN_PLACE and node not in taken_in:
            _replace(node, source_of(node), node, graph, copies)
    for node in taken_in:
        graph.erase_node(copies[node])
    return graph


def activated_in_place(x: Tensor, activation: nn.Module, maker: nn.Module | bool) -> Tensor:
    """``activation(x)``; ``x`` is overwritten, if no hook looks at it and no gradient needs it. Arguments as for
    :meth:`ActivationQuantizer.after`."""
    in_place = IN_PLACE.get(type(activation))
    # The gradient of a ReLU needs its result only, that of many another activation what it is given, or its result.
    is_needed = torch.is_grad_enabled() and (type(activation) not in RELUS or isinstance(maker, ACTIVATIONS))
    if in_place is None or is_needed or torch.compiler.is_compiling() or is_watched(activation) or not is_own(maker):
        return activation(x)  # type: ignore[no-any-return]
    return in_place(x, inplace=True)


def _replace(
    node: fx.Node, source: fx.Node, relu: fx.Node | None, graph: fx.Graph, copies: dict[fx.Node, fx.Node]
) -> None:
    """Let a copied graph call a quantizer, or a ReLU alone (``relu`` is ``node``), on the value of ``source``."""
    is_new = _makes_new(source) and sole_user(source) is (relu or node)
    if not is_new and (relu is None or relu is node):
        return
    old = copies[node]
    with graph.inserting_before(old):
        module = graph.get_attr(str(node.target))
        maker = graph.get_attr(str(source.target)) if is_new and source.op == "call_module" else is_new
        if relu is node:
            new = graph.call_function(activated_in_place, (copies[source], module, maker))
        else:
            taken_in = None if relu is None else graph.get_attr(str(relu.target))
            new = graph.call_method("after", (module, copies[source], taken_in, maker))
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _makes_new(node: fx.Node) -> bool:
    """Whether the node's value lies in memory of its own."""
    return isinstance(module_of(node), ALLOCATING) or (node.op != "call_module" and node.target in ALLOCATING_CALLS)
