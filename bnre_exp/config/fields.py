"""Fields of the configuration: documented, checked, and flattened to the names that the user types."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from enum import Enum
from typing import Any

from bnre_exp.errors import UserError


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


def check_bounds(section: Any, group: str) -> None:
    """Raise ``UserError`` for a number outside the bounds of its field."""
    for item in fields(section):
        value = getattr(section, item.name)
        bounds = {words: bound for words, bound in item.metadata["bounds"].items() if bound is not None}
        for number in value if isinstance(value, list) else [value]:
            if number is None or not bounds:
                continue
            if not (math.isfinite(number) and all(_COMPARE[words](number, bound) for words, bound in bounds.items())):
                expected = " and ".join(f"{words} {bound:.10g}" for words, bound in bounds.items())
                name = f"{group}.{item.name}" if group else item.name
                raise UserError(f"{name}={number}: expected a number {expected}; it means: {item.metadata['doc']}.")


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
