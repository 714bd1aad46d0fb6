"""How a network is computed: in bfloat16, and compiled."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bnre_exp.algorithms.feeding import device_of
from bnre_exp.errors import UserError, first_line

PRECISIONS = ("float32", "bfloat16")

# What was compiled for a network, by the circumstances of its call: compiling takes longer than many a training.
_compiled: WeakKeyDictionary[nn.Module, dict[Any, _Compiled]] = WeakKeyDictionary()


def check_precision(precision: str) -> None:
    """Raise ``UserError`` for a precision that there is not."""
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}.")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Within the block, layers compute in bfloat16, if that is the precision; quantizers never do."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def compiled(model: nn.Module, is_on: bool = True) -> Iterator[None]:
    """Within the block, calls of ``model`` are compiled by ``torch.compile``, unless ``is_on`` is False.

    One shape of input is compiled, that of the first call; others, as of a short last batch, are computed as they were.
    What was compiled is kept for the network's next block. Raises ``UserError`` where nothing can be compiled.
    """
    if not is_on:
        yield
        return
    device = device_of(model).type
    check_compiler(device)
    before: Any = model._compiled_call_impl
    kept = _compiled.setdefault(model, {})

    def call(*args: Any, **kwargs: Any) -> Any:
        key = model.training, torch.is_grad_enabled(), torch.is_autocast_enabled(device)
        return kept.setdefault(key, _Compiled())(model, args, kwargs)

    model._compiled_call_impl = call
    try:
        yield
    finally:
        model._compiled_call_impl = before


class _Compiled:
    """A network's call, compiled for one shape of input."""

    def __init__(self) -> None:
        def run(model: Any, args: Any, kwargs: Any) -> Any:
            return model._call_impl(*args, **kwargs)

        run.__code__ = run.__code__.replace()  # torch bounds how often one code object is compiled: each has its own
        self._run: Callable[..., Any] = torch.compile(run, dynamic=False)
        self._shapes: Any = None

    def __call__(self, model: Any, args: Any, kwargs: Any) -> Any:
        shapes = [_shape(value) for value in (*args, *kwargs.values())]
        if self._shapes is None:
            self._shapes = shapes
        return self._run(model, args, kwargs) if shapes == self._shapes else model._call_impl(*args, **kwargs)


def _shape(value: Any) -> Any:
    return (value.shape, value.dtype, value.stride()) if isinstance(value, Tensor) else type(value)


@functools.cache
def check_compiler(device_type: str) -> None:
    """Raise ``UserError`` unless torch.compile works on this machine, which a small function shows."""

    def one_more(x: Tensor) -> Tensor:
        return x + 1

    try:
        torch.compile(one_more)(torch.zeros(8, device=device_type))
    except Exception as error:
        needed = "a C++ compiler (Debian and Ubuntu: apt-get install g++)" if device_type == "cpu" else "Triton"
        raise UserError(
            f"compile=true: torch.compile does not work here; it needs {needed}. Install that, or leave "
            f"compile=false. ({first_line(error)})"
        ) from error
