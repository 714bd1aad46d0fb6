"""Names of tensors and nodes, which are used once in a graph."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def unique(name: str, taken: set[str]) -> str:
    """The name, with a number after it if it is taken; taken from now on."""
    found = next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in taken)
    taken.add(found)
    return found


def names_of(graph: ir.Graph) -> set[str]:
    """All names of a graph, and of the graphs inside it."""
    found = {value.name for values in (graph.inputs, graph.outputs, graph.initializers.values()) for value in values}
    for node in graph.all_nodes():
        found |= {node.name, *(value.name for value in (*node.inputs, *node.outputs) if value is not None)}
    return {name for name in found if name}
