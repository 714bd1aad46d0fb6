"""The class of traced networks, and the part of one that re-estimation computes."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from bnre_exp.quantsim.execution import executed_graph
from bnre_exp.quantsim.nodes import is_bn, module_of
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS
from bnre_exp.quantsim.quantizers.quantizer import is_watched
from bnre_exp.quantsim.tracing.frozen import META, hold


class TracedNetwork(fx.GraphModule):
    """A traced network in which modules named in its ``meta`` stay in evaluation mode, as ``bn.eval()`` asks for."""

    def train(self, mode: bool = True) -> TracedNetwork:
        """As of any module, but for those."""
        super().train(mode)
        hold(self, self.meta.get(META, ()))
        return self

    def recompile(self) -> Any:
        """Compile the graph as it is executed; ``code`` is that of the graph as it is."""
        graph = self._graph
        self._graph = executed_graph(graph)
        try:
            super().recompile()
        finally:
            self._graph = graph
        plain = graph.python_code(root_module="self")
        self._code, self._lineno_map, self._prologue_start = plain.src, plain._lineno_map, plain._prologue_start
        return plain


def up_to_batch_norms(network: fx.GraphModule) -> fx.GraphModule:
    """A network of the same modules that computes what its batch norms get and no more, and returns None; where hooks
    see the rest, the network itself."""
    wanted = [node for node in network.graph.nodes if is_bn(node)]
    needed: set[fx.Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in needed:
            needed.add(node)
            wanted += node.all_input_nodes
    rest = [node for node in network.graph.nodes if node not in needed and node.op not in ("placeholder", "output")]
    if is_watched(network) or any(is_watched(module_of(node)) for node in rest):
        return network
    graph, copies = fx.Graph(owning_module=network), dict[fx.Node, fx.Node]()
    graph.graph_copy(network.graph, copies)
    for node in reversed(rest):
        graph.erase_node(copies[node])
    graph.output(None)
    return fx.GraphModule(network, executed_graph(graph))


def calls_batch_norms_itself(network: nn.Module) -> bool:
    """Whether all calls of batch norms are nodes of a graph, so that every batch calls the same."""
    if not isinstance(network, fx.GraphModule):
        return False
    called = [module_of(node) for node in network.graph.nodes if node.op == "call_module"]
    parts = (part for module in called for part in module.modules() if part is not module)
    return not any(isinstance(part, BATCH_NORMS) for part in parts)
