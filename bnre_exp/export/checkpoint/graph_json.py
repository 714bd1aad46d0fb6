"""A torch.fx graph as JSON, node by node, and back, with nothing but data and names from the allow-list in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from bnre_exp.errors import UserError
from bnre_exp.export.checkpoint import allowed
from bnre_exp.export.checkpoint.bounds import check_call
from bnre_exp.export.checkpoint.names import fields_of, is_name, is_path, qualified_name
from bnre_exp.export.checkpoint.value_json import decode_value, encode_value

JsonDict = dict[str, Any]
# Kinds of facts about nodes that grouping relies on, and their types.
META = {
    "ndim": (int, type(None)),
    "scales_with_weight": (bool,),
    "is_float": (bool,),
    "is_single": (bool,),
    "kept_reason": (str,),
}


def encode_graph(graph: fx.Graph) -> list[JsonDict]:
    """The nodes in order. A function outside the allow-list has the target ``{"outside": "its.qualified.name"}``.

    Raises ``UserError`` naming a node that no checkpoint can hold.
    """
    if type(graph._codegen) is not fx.graph.CodeGen:
        raise UserError("its inputs or outputs are packed into containers by torch.fx; trace it without concrete_args")
    rows = []
    for node in graph.nodes:
        try:
            row = {
                "name": node.name,
                "op": node.op,
                "target": _encode_target(node),
                "args": [encode_value(x) for x in node.args],
                "kwargs": {key: encode_value(x) for key, x in node.kwargs.items()},
            }
        except UserError as error:
            raise UserError(
                f"the operation {node.name!r} cannot be stored: {error}. Move that line into a submodule and keep it "
                "whole with leaf_modules=[its class]"
            ) from error
        meta = {k: node.meta[k] for k, kinds in META.items() if k in node.meta and type(node.meta[k]) in kinds}
        rows.append({**row, "meta": meta} if meta else row)
    return rows


def _encode_target(node: fx.Node) -> Any:
    if node.op == "call_function":
        name = allowed.function_names().get(node.target)  # type: ignore[arg-type]
        if name is None:
            fields = fields_of(node.target)
            return {"outside": qualified_name(node.target), **({} if fields is None else {"fields": list(fields)})}
        if node.target is getattr:
            _check_getattr(node.args, node.kwargs)
        return name
    if node.op == "call_method":
        _check_method(node.target)
    return node.target


def _check_method(name: Any) -> None:
    if name not in allowed.methods():
        raise UserError(f"it calls the method {name!r}, which is not one of a tensor's that a checkpoint may hold")


def _check_getattr(args: Collection[Any], kwargs: Mapping[str, Any]) -> None:
    name = tuple(args)[1] if len(args) == 2 and not kwargs else None
    if not isinstance(name, str) or name not in allowed.ATTRIBUTES:
        raise UserError(f"it reads the attribute {name!r}, not one of {', '.join(sorted(allowed.ATTRIBUTES))}")


def outside_functions(rows: list[JsonDict]) -> list[str]:
    """Qualified names of the functions and classes that only the user's code has, each once."""
    targets = [row["target"] for row in rows if row["op"] == "call_function"]
    return list(
        dict.fromkeys(target["outside"] for target in targets if isinstance(target, dict) and "fields" not in target)
    )


@dataclass(frozen=True)
class Names:
    """What a graph may refer to: modules and tensors by path, and how to find a function or dataclass outside the
    allow-list by its name, and a class of named tuples by its name and fields."""

    modules: Collection[str]
    tensors: Collection[str]
    find: Callable[[str], Callable[..., Any]]
    record: Callable[[str, tuple[str, ...]], type]


def decode_graph(rows: list[JsonDict], names: Names) -> fx.Graph:
    """The inverse of :func:`encode_graph`.

    torch.fx turns a graph into source text, and pastes names into it as they are: hence the strictness about names.
    Raises ``UserError`` for anything that is not on the allow-list.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for row in rows:
        name, op = row["name"], row["op"]
        if not is_name(name) or name in nodes:
            raise UserError(f"the node name {name!r} is not an identifier, or occurs twice")
        args = tuple(decode_value(x, nodes) for x in row["args"])
        kwargs = {key: decode_value(x, nodes) for key, x in row["kwargs"].items()}
        if not all(map(is_name, kwargs)):
            raise UserError(f"the node {name!r} has a keyword argument that is not an identifier")
        try:
            target = _decode_target(op, row["target"], args, kwargs, names)
        except UserError as error:
            raise UserError(f"the node {name!r} is not allowed: {error}") from error
        nodes[name] = graph.create_node(op, target, args, kwargs, name=name)
        meta = row.get("meta", {})
        nodes[name].meta.update({key: x for key, x in meta.items() if type(x) in META.get(key, ())})
    if [row["op"] for row in rows].index("output") != len(rows) - 1:
        raise UserError("its graph does not end with the output")
    return graph


def _decode_target(op: Any, target: Any, args: tuple[Any, ...], kwargs: JsonDict, names: Names) -> Any:
    if op == "call_function":
        if isinstance(target, dict) and "fields" in target:
            return names.record(target["outside"], tuple(target["fields"]))
        if isinstance(target, dict):
            return names.find(target["outside"])
        if not isinstance(target, str) or target not in allowed.functions():
            raise UserError(f"the function {target!r} is not on the list of those that a checkpoint may call")
        if target == "builtins.getattr":
            _check_getattr(args, kwargs)
        check_call(target, args, kwargs)
        return allowed.functions()[target]
    if op == "call_method":
        _check_method(target)
        check_call(target, args, kwargs)
    elif op in ("call_module", "get_attr"):
        if not is_path(target) or target not in (names.modules if op == "call_module" else names.tensors):
            raise UserError(f"there is no module or attribute {target!r}")
    elif op == "placeholder":
        if not is_name(str(target).removeprefix("*").removeprefix("*")):
            raise UserError(f"the input name {target!r} is not an identifier")
    elif (op, target) != ("output", "output"):
        raise UserError(f"an unknown operation {op!r} with target {target!r}")
    return target
