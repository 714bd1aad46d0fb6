"""Networks that are simulated in parts, as all else takes them: the graphs of the parts, and names in the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import fx, nn

PARTS = "bnre_exp_parts"  # attribute of the whole network: the path of each part's graph, by the name that was given


def parts_of(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The graphs of the parts of a network that is simulated in parts, by the names of these; none of any other."""
    paths: Mapping[str, str] = getattr(model, PARTS, {})
    return {name: model.get_submodule(path) for name, path in paths.items()}  # type: ignore[misc]


def with_parts(model: nn.Module, change: Callable[[str, fx.GraphModule], nn.Module]) -> nn.Module:
    """A copy of a network that is simulated in parts, with what ``change(name, graph)`` makes of each."""
    whole = copy.deepcopy(model)
    for name, path in getattr(whole, PARTS).items():
        whole.set_submodule(path, change(name, whole.get_submodule(path)))  # type: ignore[arg-type]
    return whole


def named(part: str, name: str) -> str:
    """How something in a part is called in the whole network."""
    return f"{part}.{name}" if part else name
