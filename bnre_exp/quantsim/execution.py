"""How the graph of a simulation is executed: a quantizer takes in the batch norm and the ReLU before it, and what
nobody else reads is overwritten. (Networks do so themselves, by ``inplace=True``, which tracing takes from them.)"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnre_exp.quantsim.nodes import is_bn, module_of, sole_user, source_of
from bnre_exp.quantsim.quantizers.quantizer import (
    ACTIVATIONS,
    RELUS,
    ActivationQuantizer,
    allocates,
    has_one_layout,
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


def executed_graph(plain: fx.Graph) -> fx.Graph:
    """A copy of a network's graph in which quantizers are called by :meth:`ActivationQuantizer.after` or
    :meth:`~ActivationQuantizer.after_batch_norm`, where something is gained by that. The graph itself stays what is
    analysed, folded and exported."""
    copy = _Copy(plain)
    for node in reversed(plain.nodes):
        if node in copy.taken_in:
            copy.graph.erase_node(copy.of[node])
        elif node.op == "call_module" and isinstance(source_of(node), fx.Node):
            with copy.graph.inserting_before(copy.of[node]):
                copy.rewrite(node)
    return copy.graph


def activated_in_place(x: Tensor, activation: nn.Module, maker: nn.Module | bool) -> Tensor:
    """``activation(x)``; ``x`` is overwritten, if no hook looks at it and no gradient needs it. Arguments as for
    :meth:`ActivationQuantizer.after`."""
    in_place = IN_PLACE.get(type(activation))
    # The gradient of a ReLU needs its result only, that of many another activation what it is given, or its result.
    is_needed = torch.is_grad_enabled() and (type(activation) not in RELUS or isinstance(maker, ACTIVATIONS))
    is_free = is_own(maker) and has_one_layout(x) and not is_watched(activation)
    if in_place is None or is_needed or torch.compiler.is_compiling() or not is_free:
        return activation(x)  # type: ignore[no-any-return]
    return in_place(x, inplace=True)


class _Copy:
    """A graph that is being rewritten from its end. of: the copies of the plain graph's nodes; taken_in: the nodes that
    their readers compute."""

    def __init__(self, plain: fx.Graph) -> None:
        self.graph = fx.Graph(owning_module=plain.owning_module)
        self.of: dict[fx.Node, fx.Node] = {}
        self.taken_in: set[fx.Node] = set()
        self.graph.output(self.graph.graph_copy(plain, self.of))
        self.graph.set_codegen(plain._codegen)

    def rewrite(self, node: fx.Node) -> None:
        """The call of a module; what is new comes before its copy."""
        source = source_of(node)
        if isinstance(module_of(node), ActivationQuantizer):
            is_relu = type(module_of(source)) in RELUS and bool(source.args) and sole_user(source) is node
            self._call_quantizer(node, *((source_of(source), source) if is_relu else (source, None)))
        elif type(module_of(node)) in IN_PLACE and (maker := self._maker(source, node)):
            given = (self.of[source], self._module(node), maker)
            self._replace(node, self.graph.call_function(activated_in_place, given))

    def _call_quantizer(self, node: fx.Node, source: fx.Node, relu: fx.Node | None) -> None:
        maker = self._maker(source, relu or node)
        if relu is None and maker is False:
            return
        taken_in, method = [] if relu is None else [relu], "after"
        activation = None if relu is None else self._module(relu)
        if maker and is_bn(source) and _is_alone(source, relu or node) and node.prev in (source, relu):
            taken_in, method, source = [*taken_in, source], "after_batch_norm", source_of(source)
        given = (self._module(node), self.of[source], activation, maker)
        self._replace(node, self.graph.call_method(method, given))
        self.taken_in.update(taken_in)

    def _module(self, node: fx.Node) -> fx.Node:
        return self.graph.get_attr(str(node.target))

    def _maker(self, source: Any, reader: fx.Node) -> fx.Node | bool:
        """What makes a value that lies in memory of its own, for this reader alone: a module, or True. False: nothing
        does."""
        if not isinstance(source, fx.Node) or sole_user(source) is not reader:
            return False
        if source.op == "call_module":
            return allocates(module_of(source)) and self._module(source)
        return source.target in ALLOCATING_CALLS

    def _replace(self, node: fx.Node, call: fx.Node) -> None:
        old, self.of[node] = self.of[node], call
        old.replace_all_uses_with(call)
        self.graph.erase_node(old)


def _is_alone(bn: fx.Node, reader: fx.Node) -> bool:
    """Whether a batch norm gets one value and nothing else, and is followed at once by its reader, which alone uses it,
    for its shape neither."""
    return len(bn.args) == 1 and not bn.kwargs and set(bn.users) == {reader} and reader.prev is bn
