"""What a checkpoint may ask for: nothing that takes more time or memory than its size explains.

Loading runs no operation of the graph. What a network takes when it runs depends on its inputs, as for any network;
only numbers that stand in the file and would alone exhaust a machine are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from bnre_exp.errors import UserError

LARGEST_SIZE = 2**28  # elements that the numbers of one operation may ask for
LARGEST_EXPONENT, LARGEST_BASE = 1024, 2**20  # of numbers; integers grow without end
BITS = (2, 32)  # of codes; biases have 32
POWERS = ("pow", "ipow", "lshift", "ilshift")
# Operations and layers whose numbers say how large the result is, by what their names begin with; and the arguments
# whose numbers do not.
SIZED = (
    "zeros", "ones", "full", "empty", "eye", "arange", "linspace", "logspace", "new_", "expand", "broadcast_to",
    "repeat", "tile", "interpolate", "upsample", "pad", "one_hot", "rand", "adaptive_", "tril_indices", "triu_indices",
    "Upsample", "Adaptive", "ConstantPad", "ZeroPad",
)  # fmt: skip
VALUES = ("value", "fill_value", "align_corners", "mode")
CALLS, CALLS_A_TENSOR = 500, 50  # of torch in a constructor: each parameter is made and filled


def check_call(target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for an operation of the graph that computes without reading anything, or asks for too much.

    target: its name in the file; args, kwargs: as the graph has them.
    """
    space, _, name = target.rpartition(".")
    given = [*_leaves(args), *_leaves(dict(kwargs))]
    numbers = [abs(x) for x in given if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if space in ("operator", "math") and not any(isinstance(x, fx.Node) for x in given):
        raise UserError(f"{target} computes with constants only, which no traced network does")
    if name in POWERS:
        is_base = bool(args) and not isinstance(args[0], fx.Node)
        most = LARGEST_BASE if is_base else LARGEST_EXPONENT
        if any(x > most for x in numbers):
            raise UserError(f"{target} is given {max(numbers)}, expected at most {most}")
    if name.endswith("full"):
        args = args[: 1 if name == "full" else 2]  # then comes the value
    check_size(name, args, kwargs)


def check_size(name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if the numbers given to an operation or layer multiply to more than :data:`LARGEST_SIZE`."""
    if not name.startswith(SIZED) or name.endswith("_like"):
        return
    sizes = _leaves([args, {key: value for key, value in kwargs.items() if key not in VALUES}])
    numbers = [abs(x) for x in sizes if isinstance(x, (int, float)) and math.isfinite(x) and abs(x) > 1]
    if math.prod(numbers) > LARGEST_SIZE:
        raise UserError(f"{name} is asked for {math.prod(numbers):.3g} elements, expected at most {LARGEST_SIZE:,}")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from _leaves([value.start, value.stop, value.step])
    else:
        yield value


def check_arguments(name: str, args: Mapping[str, Any], tensors: int) -> None:
    """Raise ``UserError`` for constructor arguments of a layer that would take memory or time of their own.

    name: of its class; tensors: how many the file has for it. What is made of the other arguments is counted by
    :class:`FewCalls` and compared with that.
    """
    for key, value in args.items():
        if key.endswith("layers") and isinstance(value, (int, float)) and value > tensors:
            raise UserError(f"{key}={value} is more than the {tensors} tensors that the file has for it")
    if "device" in args:
        raise UserError("a layer is given a device, on which it would make tensors")
    check_bits(args.get("bits", BITS[0]))
    check_size(name.rpartition(".")[2], (), args)


def check_bits(bits: Any) -> None:
    """Raise ``UserError`` unless it is a number of bits that codes can have."""
    low, high = BITS
    if type(bits) is not int or not low <= bits <= high:
        raise UserError(f"bits={str(bits)[:20]}, expected {low} to {high}")


class FewCalls(TorchFunctionMode):
    """While it is entered, no more calls of torch than it takes to make the tensors of ``state``."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors, self.left = len(state), CALLS + CALLS_A_TENSOR * len(state)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise UserError(f"its arguments make far more than the {self.tensors} tensors that the file has for it")
        return func(*args, **(kwargs or {}))
