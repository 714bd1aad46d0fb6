"""Configuration values and names in the form that MLflow takes, as the user types them where that is possible."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LONGEST_PARAM = 6000  # characters that MLflow takes
CUT = "… (cut)"


def typed(value: Any, nested: bool = False) -> str:
    """As the user types it: null, true, [0.5, 1], {depth: 3, name: 'a b'}."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(typed(item, True) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {typed(item, True)}" for key, item in value.items()) + "}"
    plain = not nested or not isinstance(value, str) or re.fullmatch(r"(?!(null|true|false)$)[A-Za-z_][\w./*-]*", value)
    return str(value) if plain else "'" + str(value).replace("'", "\\'") + "'"


def as_params(params: Mapping[str, Any]) -> dict[str, str]:
    """MLflow params by name, each value as text."""
    named: dict[str, str] = {}
    for key, value in params.items():
        name = metric_key(key)
        while name in named:  # MLflow refuses the whole batch for one key given twice
            name += "_"
        named[name] = shortened(typed(value), LONGEST_PARAM)
    return named


def shortened(text: str, longest: int) -> str:
    """The text in at most ``longest`` characters; one that is cut says so."""
    return text if len(text) <= longest else text[: longest - len(CUT)] + CUT


def metric_key(name: str) -> str:
    """The name without the characters that MLflow refuses."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)


def model_name(name: str) -> str:
    """A name for a logged model."""
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in name)
