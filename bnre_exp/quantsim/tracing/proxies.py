"""What stands for a value while a network is traced."""

from __future__ import annotations

import builtins
import functools
import gc
import operator
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx.proxy import Attribute, Proxy
from torch.utils import _pytree as pytree

from bnre_exp.quantsim.tracing.metadata import is_metadata

# Where the code is that deals with proxies as such: not in torch/__init__.py, whose is_tensor asks for a value's type.
PROXIES_MEET = (
    *(
        os.path.join(os.path.dirname(torch.__file__), name)
        for name in ("fx/", "nn/", "utils/", "_library/", "overrides.py", "functional.py", "_tensor.py", "_ops.py")
    ),
    os.path.dirname(os.path.dirname(__file__)),
)
# Of torch: they ask no argument for its own way of doing it; and those that give another value each time.
MAKERS = ("as_tensor", "asarray", "tensor", "zeros", "ones", "empty", "full", "finfo", "iinfo")
RANDOM = ("rand", "randn", "randint", "randperm")


class _Decided:
    """Python asks these of a number where it does not merely compute with it."""

    tracer: Any

    def __getattr__(self, k: str) -> Any:
        if k == "type" and isinstance(self, TracedAttribute) and self.attr == "device":
            return self._ask("device")  # torch.autocast takes a str only
        return TracedAttribute(self, k)  # type: ignore[arg-type]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", assigned, (self, index, value), {})

    def _ask(self, kind: str) -> Any:
        return self.tracer.decide(self, kind)

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __index__(self) -> int:
        return int(self._ask("int"))

    def __int__(self) -> int:
        return int(self._ask("int"))

    def __float__(self) -> float:
        return float(self._ask("float"))

    def __hash__(self) -> int:
        """Membership in a set or dict of numbers is a decision, too."""
        return int(self._ask("hash")) if is_metadata(self.node) else object.__hash__(self)  # type: ignore[attr-defined]


class TracedValue(_Decided, Proxy):
    tracer: Any

    def __getitem__(self, index: Any) -> Any:
        """What a module gives as None, among others, is None: networks ask for that."""
        if isinstance(index, int) and self.tracer.is_of_users_module(self.node):
            (value,) = self.tracer.values_of(self, samples=1)
            if isinstance(value, (tuple, list)) and value[index] is None:
                return None
        return super().__getitem__(index)  # type: ignore[misc]

    def __iadd__(self, other: Any) -> Any:
        return self._changed(operator.add, other)

    def __isub__(self, other: Any) -> Any:
        return self._changed(operator.sub, other)

    def __imul__(self, other: Any) -> Any:
        return self._changed(operator.mul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._changed(operator.truediv, other)

    def _changed(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        """A tensor is changed for all who have it; a size is a number, of which Python computes another."""
        if is_metadata(self.node):
            return NotImplemented
        self.node = self.tracer.create_proxy("call_function", function, (self, other), {}).node
        return self


class TracedAttribute(_Decided, Attribute):
    tracer: Any


@contextmanager
def recorded(tracer: Any) -> Iterator[None]:
    """Within the block ``isinstance(x, Tensor)`` is true of what stands for a tensor and ``callable(x)`` is not,
    ``len(x)`` of a tensor is ``x.shape[0]``, functions of torch that make something of anything take it, its checks ask
    for a decision, and random tensors are made anew at every call. (A ``__class__`` that says so would be believed by
    torch's C++ as well, which then reads memory that is not there.)"""

    def is_instance(value: Any, kinds: Any) -> bool:
        if not issubclass(type(value), _Decided) or _asker(2).startswith(PROXIES_MEET):
            return plain(value, kinds)
        return issubclass(tracer.kind_of(value), kinds)

    def length(value: Any) -> Any:
        if not issubclass(type(value), _Decided) or _asker(2).startswith(PROXIES_MEET):
            return plain_length(value)
        return value.shape[0] if issubclass(tracer.kind_of(value), Tensor) else plain_length(value)

    def is_callable(value: Any) -> bool:
        if not issubclass(type(value), _Decided) or _asker(2).startswith(PROXIES_MEET):
            return plain_callable(value)
        return issubclass(tracer.kind_of(value), Callable)  # type: ignore[arg-type]

    def making(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            stands_for = any(issubclass(type(value), Proxy) for value in pytree.tree_leaves((args, kwargs)))
            if stands_for or (name in RANDOM and not tracer.is_looking_up and not _asker(2).startswith(PROXIES_MEET)):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def checked(error: Any, condition: Any, message: Any) -> None:
        plain_check(error, bool(condition), message)

    plain, plain_length, plain_callable, plain_check = isinstance, len, callable, torch._check_with
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (builtins, "isinstance", is_instance),
        (builtins, "len", length),
        (builtins, "callable", is_callable),
        (torch, "_check_with", checked),
        *((torch, name, making(name, getattr(torch, name))) for name in (*MAKERS, *RANDOM)),
    ]
    before = [getattr(holder, name) for holder, name, _ in replaced]
    try:
        for holder, name, function in replaced:
            setattr(holder, name, function)
        yield
    finally:
        for (holder, name, _), function in zip(replaced, before):
            setattr(holder, name, function)


def computed_so_far(modules: Collection[str]) -> dict[Any, int]:
    """How many results all functions of ``functools.lru_cache`` have computed. Those of the packages of ``modules``, a
    network's, forget theirs: a grid that was made for one type of numbers would become a constant of the graph."""
    kind, packages = type(functools.lru_cache(len)), {name.partition(".")[0] for name in modules} - {"torch"}
    found = [function for function in gc.get_objects() if type(function) is kind]
    for function in found:
        if str(getattr(function, "__module__", "")).partition(".")[0] in packages:
            function.cache_clear()
    return {function: function.cache_info().misses for function in found}


def _asker(depth: int) -> str:
    """The file of the code that called, so many calls up."""
    return sys._getframe(depth).f_code.co_filename


def is_in_place(method: str) -> bool:
    """Whether a method of tensors changes its own: ``relu_``, not ``__len__``."""
    return re.fullmatch(r"[a-z]\w*[a-z0-9]_", method) is not None


def assigned(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of ``x`` in which the items at ``index`` are ``value``: what ``x[index] = value`` makes of ``x``."""
    copy = x.clone()
    copy[index] = value
    return copy
