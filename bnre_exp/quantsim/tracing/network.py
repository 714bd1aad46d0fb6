"""The class of traced networks, and the part of one that re-estimation computes."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from bnre_exp.errors import UserError
from bnre_exp.quantsim.execution import executed_graph
from bnre_exp.quantsim.nodes import module_of
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS
from bnre_exp.quantsim.quantizers.quantizer import is_watched
from bnre_exp.quantsim.tracing.frozen import META, hold

EVALUATION_ALONE = "is_for_evaluation_alone"  # in meta: what training mode does otherwise, in words
CHOOSING = {torch.nonzero, torch.masked_select, torch.unique, "nonzero", "masked_select", "unique"}


class TracedNetwork(fx.GraphModule):
    """A traced network in which modules named in its ``meta`` stay in evaluation mode, as ``bn.eval()`` asks for.

    training_graph: what is computed in training mode, by the same modules, where that is something else than what the
    graph says; None: the graph is that of both modes. Only the graph is analysed, folded and exported.
    """

    training_graph: fx.Graph | None = None

    @property
    def graphs(self) -> list[fx.Graph]:
        """The graph, and that of the training mode, where it is another."""
        return [self.graph, *([] if self.training_graph is None else [self.training_graph])]

    def all_nodes(self) -> list[Any]:
        """The nodes of all graphs."""
        return [node for graph in self.graphs for node in graph.nodes]

    def train(self, mode: bool = True) -> TracedNetwork:
        """As of any module, but for those. Raises ``UserError`` where the network is one for evaluation alone."""
        if mode and (why := self.meta.get(EVALUATION_ALONE)):
            raise UserError(
                f"This simulation is for evaluation alone: in training mode the network does something else ({why}). "
                'To train it, quantize with modes="both".'
            )
        super().train(mode)
        hold(self, self.meta.get(META, ()))
        return self

    def recompile(self) -> Any:
        """Compile the graphs as they are executed; ``code`` is that of the graph as it is."""
        graph = self._graph
        in_training = None
        if self.training_graph is not None:
            self.training_graph.owning_module = self
            in_training = self._compiled(self.training_graph)
        in_evaluation = self._compiled(graph)
        if in_training is not None:
            type(self).forward = _by_mode(in_evaluation, in_training)  # type: ignore[method-assign]
        self._graph = graph
        plain = graph.python_code(root_module="self")
        self._code, self._lineno_map, self._prologue_start = plain.src, plain._lineno_map, plain._prologue_start
        return plain

    def _compiled(self, graph: fx.Graph) -> Callable[..., Any]:
        before, self._graph = self._graph, executed_graph(graph)
        try:
            super().recompile()
        finally:
            self._graph = before
        return type(self).forward

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedNetwork:
        copied: TracedNetwork = super().__deepcopy__(memo)  # type: ignore[assignment]
        if self.training_graph is not None:
            copied.training_graph = copy.deepcopy(self.training_graph, memo)
            copied.recompile()
        return copied


def _by_mode(in_evaluation: Callable[..., Any], in_training: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
        return (in_training if self.training else in_evaluation)(self, *inputs, **kwargs)

    return forward


def up_to_batch_norms(network: TracedNetwork) -> fx.GraphModule:
    """A network of the same modules that computes what its batch norms get and no more, and returns None; where hooks
    see the rest, the network itself."""
    wanted = [node for node in network.graph.nodes if _parts(node, BATCH_NORMS)]
    needed: set[fx.Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in needed:
            needed.add(node)
            wanted += node.all_input_nodes
    rest = [node for node in network.graph.nodes if node not in needed and node.op not in ("placeholder", "output")]
    if is_watched(network) or any(map(is_watched, (part for node in rest for part in _parts(node)))):
        return network
    graph, copies = fx.Graph(owning_module=network), dict[fx.Node, fx.Node]()
    graph.graph_copy(network.graph, copies)
    for node in reversed(rest):
        graph.erase_node(copies[node])
    graph.output(None)
    return fx.GraphModule(network, executed_graph(graph))


def depends_on_shapes_only(network: nn.Module) -> bool:
    """Whether all batches of a shape call the same batch norms, with as many values: all these calls are nodes of the
    graph, and no part of a tensor is chosen by values."""
    if not isinstance(network, TracedNetwork):
        return False
    nodes = list(network.graph.nodes)
    within = (part for node in nodes for part in _parts(node, BATCH_NORMS) if part is not module_of(node))
    is_choosing = (
        node.target in CHOOSING or (node.target is operator.getitem and len(node.all_input_nodes) > 1)
        for node in nodes
        if node.op in ("call_function", "call_method")
    )
    return not any(within) and not any(is_choosing)


def _parts(node: fx.Node, kinds: Any = nn.Module) -> list[nn.Module]:
    """The module that a node calls, and those within it, as far as they are of ``kinds``."""
    module = module_of(node)
    return [] if module is None else [part for part in module.modules() if isinstance(part, kinds)]
