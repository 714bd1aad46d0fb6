"""Names of tensors and nodes, which are used once in a graph."""

from __future__ import annotations

import itertools


def unique(name: str, taken: set[str]) -> str:
    """The name, with a number after it if it is taken; taken from now on."""
    found = next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in taken)
    taken.add(found)
    return found
