"""Fields of the configuration: documented, checked, and flattened to the names that the user types."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from bnre_exp.errors import UserError

MOST_BATCHES = 10**6  # beyond that, a number is a slip of the pen


def opt(
    default: Any = None,
    doc: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    is_old: bool = False,
) -> Any:
    """A documented field; a number (or each of a list of numbers) must lie within the given bounds. None is allowed
    where the type is optional, and is never compared. is_old: an old name, which is accepted and not shown."""
    bounds = {"at least": ge, "greater than": gt, "at most": le, "less than": lt}
    metadata = {"doc": doc, "bounds": bounds, "is_old": is_old}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "at least": lambda value, bound: value >= bound,
    "greater than": lambda value, bound: value > bound,
    "at most": lambda value, bound: value <= bound,
    "less than": lambda value, bound: value < bound,
}


def check_fields(section: Any, group: str) -> None:
    """Raise ``UserError`` for a value that is not of its field's type, no finite number, or outside its bounds."""
    hints = get_type_hints(type(section))
    for item in fields(section):
        value, doc = getattr(section, item.name), item.metadata["doc"]
        name = f"{group}.{item.name}" if group else item.name
        if not _is_of(value, hints[item.name]):
            raise UserError(f"{name}={value!r}: expected {_words(hints[item.name])}; it means: {doc}.")
        bounds = {words: bound for words, bound in item.metadata["bounds"].items() if bound is not None}
        expected = " and ".join(f"{words} {bound:.10g}" for words, bound in bounds.items())
        for number in value if isinstance(value, list) else [value]:
            is_number = isinstance(number, (int, float))
            fits = all(_COMPARE[words](number, bound) for words, bound in bounds.items()) if is_number else True
            if is_number and not (abs(number) < math.inf and fits):  # nor nan
                kind = f"a number {expected}" if bounds else "a finite number"
                raise UserError(f"{name}={number}: expected {kind}; it means: {doc}.")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotation of this package; a whole number is also a number, true is none."""
    arguments = get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(entry, arguments[0]) for entry in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(key, arguments[0]) for key in value)
    if arguments:  # X | None
        return any(_is_of(value, argument) for argument in arguments)
    if kind in (int, float):
        return type(value) in ((int,) if kind is int else (int, float))
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    """A type in words: a list of numbers, or null."""
    arguments = get_args(kind)
    if get_origin(kind) is list:
        return f"a list, each {_words(arguments[0])}"
    if get_origin(kind) is dict:
        return "{NAME: VALUE}"
    if arguments:
        return " or ".join(_words(argument) for argument in arguments)
    if issubclass(kind, Enum):
        return f"one of {', '.join(member.name for member in kind)}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, "null")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flat ``{"quant.weight_bits": 4, ...}`` with the names the user types; enums as their names."""
    known = [f.name for f in fields(config) if not f.metadata.get("is_old")] if is_dataclass(config) else None
    items = dict(config) if known is None else {name: getattr(config, name) for name in known}
    flat: dict[str, Any] = {}
    for key, value in items.items():
        name = f"{prefix}{key}"
        if isinstance(value, Enum):
            flat[name] = value.name
        elif is_dataclass(value) or (isinstance(value, dict) and value):
            flat.update(flatten(value, name + "."))
        elif isinstance(value, list) and value and all(is_dataclass(item) for item in value):
            for index, item in enumerate(value):
                flat.update(flatten(item, f"{name}[{index}]."))
        elif isinstance(value, list):
            flat[name] = [item.name if isinstance(item, Enum) else item for item in value]
        else:
            flat[name] = value
    return flat
