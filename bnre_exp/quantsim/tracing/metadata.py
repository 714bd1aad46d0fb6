"""What tells about a tensor without reading its values."""

from __future__ import annotations

from torch import fx

METADATA_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_contiguous"}
METADATA_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_mps", "is_meta", "type", "index"}


def is_metadata(node: fx.Node, known: dict[fx.Node, bool] | None = None) -> bool:
    """Whether the value follows from sizes, types and devices of tensors. known: of nodes asked before."""
    known = {} if known is None else known  # many ways lead to a node in a graph with branches
    if node not in known:
        known[node] = _reads_metadata(node) or _is_computed_from(node, known)
    return known[node]


def _reads_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in METADATA_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in METADATA_ATTRIBUTES


def _is_computed_from(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    sources = node.all_input_nodes if node.op in ("call_function", "call_method") else []
    return bool(sources) and all(is_metadata(source, known) for source in sources)
