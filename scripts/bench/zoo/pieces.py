"""How a network of a zoo is fed, and the pieces of it that are graphs: the whole, or the parts of a detector."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Arguments = Callable[[int], tuple[Any, ...]]


class Built(NamedTuple):
    """A network with random weights, and how to call it.

    inputs: what to try, the smallest first: the shape of an item of a batch, ``[C, H, W]``, or a function of the
    batch's size that returns all arguments. parts: the names of those that are simulated, of a network that cannot be
    traced as a whole.
    """

    model: nn.Module
    inputs: Sequence[tuple[int, ...] | Arguments]
    parts: Sequence[str] = ()


@dataclass(frozen=True)
class Piece:
    """What is one graph in the simulation, the whole network under the empty name, with the arguments of a call."""

    name: str
    original: nn.Module
    args: tuple[Any, ...]

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """The tensors among the arguments, which are the graph's inputs; those of numbers with a point as ``dtype``."""
        tensors = [leaf for leaf in tree_leaves(self.args) if isinstance(leaf, Tensor)]
        return [x.to(dtype) if x.is_floating_point() else x for x in tensors]

    def inner(self, name: str) -> str:
        """The name that something in this piece has in its graph."""
        return name.removeprefix(f"{self.name}.") if self.name else name

    def has(self, name: str) -> bool:
        """Whether something of the whole network, by its name there, is in this piece."""
        return not self.name or name.startswith(f"{self.name}.")


def call(network: Any, batch: Any) -> Any:
    """Run a network on a batch: a tensor, or a tuple of all arguments."""
    return network(*batch) if isinstance(batch, tuple) else network(batch)


def first_that_fits(model: nn.Module, inputs: Sequence[tuple[int, ...] | Arguments]) -> list[Any]:
    """Three batches of unequal size, of the first inputs that the network takes in both modes."""
    error: Exception = ValueError("no size to try")
    for shape in inputs:
        batches = [shape(size) if callable(shape) else _noise(shape, size, i) for i, size in enumerate((5, 3, 6))]
        try:
            with torch.no_grad():
                for training in (True, False):
                    call(copy.deepcopy(model).train(training), batches[1])
            return batches
        except (RuntimeError, ValueError, AssertionError) as caught:
            error = caught
    raise error


def _noise(shape: Sequence[int], size: int, place: int) -> Tensor:
    return torch.randn(size, *shape) * (1 + place / 8) + place / 16


def shape_of(batch: Any) -> str:
    """The shape of an item of a batch, of its first argument."""
    first = batch[0] if isinstance(batch, tuple) else batch
    return "×".join(map(str, first[0].shape))


@torch.no_grad()
def pieces_of(model: nn.Module, parts: Sequence[str], batch: Any) -> list[Piece]:
    """The pieces of a network in evaluation mode, with the arguments that a batch brings them."""
    if not parts:
        return [Piece("", model, batch if isinstance(batch, tuple) else (batch,))]
    calls: dict[str, tuple[Any, ...]] = {}
    handles = []
    for name in parts:

        def note(_: Any, args: tuple[Any, ...], name: str = name) -> None:
            calls.setdefault(name, tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args))

        handles.append(model.get_submodule(name).register_forward_pre_hook(note))
    call(model, batch)
    for handle in handles:
        handle.remove()
    return [Piece(name, model.get_submodule(name), calls[name]) for name in parts]


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, at any depth."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(item)
