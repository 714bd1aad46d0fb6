"""What stands for a value while a network is traced."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch.fx.proxy import Attribute, Proxy

from bnre_exp.quantsim.tracing.metadata import is_metadata

# Where the code is that deals with proxies as such: not in torch/__init__.py, whose is_tensor asks for a value's type.
PROXIES_MEET = (
    *(
        os.path.join(os.path.dirname(torch.__file__), name)
        for name in ("fx/", "nn/", "utils/", "_library/", "overrides.py", "functional.py", "_tensor.py", "_ops.py")
    ),
    os.path.dirname(os.path.dirname(__file__)),
)


class _Decided:
    """Python asks these of a number where it does not merely compute with it."""

    tracer: Any

    @property
    def __class__(self) -> type:  # type: ignore[misc, override]
        """That of the value, to which a network may put isinstance; a proxy to torch.fx and to Python's own code."""
        caller = sys._getframe(1).f_code.co_filename
        return type(self) if caller.startswith(PROXIES_MEET) else self.tracer.kind_of(self)

    def __getattr__(self, k: str) -> Any:
        if k == "_is_param":
            return False  # isinstance(x, nn.Parameter) asks for it
        if k == "type" and isinstance(self, TracedAttribute) and self.attr == "device":
            return self._ask("device")  # torch.autocast takes a str only
        return TracedAttribute(self, k)  # type: ignore[arg-type]

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


class TracedAttribute(_Decided, Attribute):
    tracer: Any
