"""A part of a network that is simulated, in its place: how it is called, and what it gives."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from bnre_exp.errors import UserError

Call = tuple[list[Any], TreeSpec]  # the arguments of a part, and how they are given
CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), enum.Enum, slice, torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Calling:
    """How a part is called. structure: of its arguments; constants: what is no tensor among them, by place; gives: the
    class of what it returns, where that is a dict of some kind, such as an OrderedDict."""

    structure: TreeSpec
    constants: Mapping[int, Any]
    gives: type | None = None

    def why_another(self, call: Call) -> str:
        """What of a call is not as it has to be, in words; "" where all is."""
        leaves, given = call
        if self.structure != given:
            expected = [self.constants.get(place, _TENSOR) for place in range(self.structure.num_leaves)]
            return f"expected {_shown(expected, self.structure)}, got {_shown(leaves, given)}."
        for place, leaf in enumerate(leaves):
            if place not in self.constants:
                if not isinstance(leaf, Tensor):
                    return f"expected a tensor, got {leaf!r}."
            elif not _is_same(leaf, self.constants[place]):
                shown = "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
                return f"expected {self.constants[place]!r}, as on the example, got {shown}."
        return ""

    def given(self, output: Any) -> Any:
        """What a graph returns, which is a plain dict, as the part does."""
        if self.gives is None or not isinstance(output, dict) or isinstance(output, self.gives):
            return output
        return self.gives(**output) if dataclasses.is_dataclass(self.gives) else self.gives(output)


class Part(nn.Module):
    """A part of a network: its graph, called with the tensors among the part's arguments.

    ``original``: the part as it was, without its parameters, for whatever else the network asks of it, such as the
    computation of a loss. It is always in the part's mode, and its buffers are where the part's are.
    """

    def __init__(self, network: nn.Module, calling: Calling, original: nn.Module) -> None:
        super().__init__()
        self.network, self.calling = network, calling
        self.__dict__["original"] = original  # no submodule: it has no state of its own
        self.training = network.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" in self.__dict__ and not name.startswith("__"):
                return getattr(self.__dict__["original"], name)
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training" and "original" in self.__dict__:  # set by train, and by whoever restores modes
            for module in self.__dict__["original"].modules():
                module.training = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Part:
        super()._apply(fn, recurse)
        for module in self.__dict__["original"].modules():
            module._buffers.update({name: fn(x) for name, x in module._buffers.items() if x is not None})
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        if why := self.calling.why_another((leaves, structure)):
            raise UserError(
                "A part of the network is called with other arguments than those that it was quantized for: " + why
            )
        tensors = (leaf for place, leaf in enumerate(leaves) if place not in self.calling.constants)
        return self.calling.given(self.network(*tensors))


def _is_same(given: Any, constant: Any) -> bool:
    is_nan = constant != constant
    return isinstance(given, CONSTANTS) and (given != given if is_nan else given == constant)


class _Tensor:
    def __repr__(self) -> str:
        return "tensor"


_TENSOR = _Tensor()


def _shown(leaves: Sequence[Any], structure: TreeSpec) -> str:
    args, kwargs = tree_unflatten([_TENSOR if isinstance(x, Tensor) else x for x in leaves], structure)
    return f"({', '.join([*map(repr, args), *(f'{name}={value!r}' for name, value in kwargs.items())])})"
