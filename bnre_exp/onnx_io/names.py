"""Names of tensors and nodes, which are used once in a graph."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def unique(name: str, taken: set[str]) -> str:
    """The name, with a number after it if it is taken; taken from now on."""
    found = next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in taken)
    taken.add(found)
    return found


def names_of(graph: onnx.GraphProto) -> set[str]:
    """All names of a graph, and of the graphs inside it."""
    found = {item.name for items in (graph.input, graph.output, graph.initializer) for item in items}
    for node in all_nodes(graph):
        found |= {node.name, *node.input, *node.output}
    return found


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside it."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.type in (5, 10) else []:
                found += all_nodes(inner)
    return found
