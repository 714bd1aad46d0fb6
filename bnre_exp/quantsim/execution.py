"""How the graph of a simulation is executed: a quantizer takes in the ReLU before it, and may overwrite its input."""

from __future__ import annotations

import operator

import torch
from torch import fx

from bnre_exp.quantsim.nodes import is_bn, is_layer, module_of, sole_user, source_of
from bnre_exp.quantsim.quantizers.quantizer import RELUS, ActivationQuantizer

MAKES_NEW = {operator.add, operator.mul, torch.add, torch.mul, "add", "mul"}


def executed_graph(network: fx.GraphModule) -> fx.Graph:
    """A copy of the network's graph in which quantizers are called by :meth:`ActivationQuantizer.after`, where
    something is gained by that. The graph itself stays what is analysed, folded and exported."""
    graph = fx.Graph(owning_module=network)
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(network.graph, copies))
    graph.set_codegen(network.graph._codegen)
    for node in network.graph.nodes:
        if isinstance(module_of(node), ActivationQuantizer):
            _take_in(node, graph, copies)
    return graph


def _take_in(node: fx.Node, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
    activation, source = None, source_of(node)
    if type(module_of(source)) in RELUS and sole_user(source) is node:
        activation, source = source, source_of(source)
    is_own = sole_user(source) is (activation or node) and _makes_new(source)
    if activation is None and not is_own:
        return
    old = copies[node]
    with graph.inserting_before(old):
        quantizer = graph.get_attr(str(node.target))
        relu = None if activation is None else graph.get_attr(str(activation.target))
        maker = graph.get_attr(str(source.target)) if is_own and source.op == "call_module" else is_own
        new = graph.call_method("after", (quantizer, copies[source], relu, maker))
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    if activation is not None:
        graph.erase_node(copies[activation])


def _makes_new(node: fx.Node) -> bool:
    """Whether the node's value lies in memory of its own."""
    return is_layer(node) or is_bn(node) or (node.op != "call_module" and node.target in MAKES_NEW)
