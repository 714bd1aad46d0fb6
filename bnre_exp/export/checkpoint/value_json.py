"""Values of a graph as JSON, and back: numbers, strings, containers, node references and a few constants of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bnre_exp.errors import UserError

_CONSTANTS = {
    kind.__name__: {
        str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, kind)
    }
    for kind in (torch.dtype, torch.memory_format, torch.layout)
}


def encode_value(value: Any) -> Any:
    """A value of a graph as JSON. Raises ``UserError`` for what is not plain data."""
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return _checked(value)
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Size):
        return {"size": [int(x) for x in value]}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode_value(x) for x in value]}
    if isinstance(value, list):
        return [encode_value(x) for x in value]
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, encode_value(x)] for key, x in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode_value(x) for x in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    name = str(value).removeprefix("torch.")
    if name in _CONSTANTS.get(type(value).__name__, {}):
        return {type(value).__name__: name}
    raise UserError(f"a value of type {type(value).__name__} cannot be stored")


def _checked(value: int) -> int:
    """An integer that torch could hold."""
    if not -(2**63) <= value < 2**64:
        raise UserError(f"an integer of {value.bit_length()} bits is more than any argument has")
    return value


def decode_value(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The inverse of :func:`encode_value`; ``nodes`` are those that may be referred to."""
    if isinstance(data, list):
        return [decode_value(x, nodes) for x in data]
    if type(data) is int:
        return _checked(data)
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "float":
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
    if kind == "node":
        if content not in nodes:
            raise UserError(f"a node reads {content!r}, which does not come before it")
        return nodes[content]
    if kind == "size":
        return torch.Size(content)
    if kind == "tuple":
        return tuple(decode_value(x, nodes) for x in content)
    if kind == "dict":
        if not all(type(key) in (str, int) for key, _ in content):
            raise UserError("a dict has a key that is neither a string nor an integer")
        return {key: decode_value(x, nodes) for key, x in content}
    if kind == "slice":
        return slice(*(decode_value(x, nodes) for x in content))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "device":
        return torch.device(content)
    if kind in _CONSTANTS and content in _CONSTANTS[kind]:
        return _CONSTANTS[kind][content]
    raise UserError(f"a value of an unknown kind {kind!r}")
