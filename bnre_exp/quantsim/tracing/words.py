"""What the code of a class mentions."""

from __future__ import annotations

import inspect
from types import CodeType

from torch import nn


def reads_training(kind: type) -> bool:
    """Whether a method of the class, or of its bases below nn.Module, looks at ``self.training``."""
    return mentions(kind, "training")


def mentions(kind: type, word: str) -> bool:
    """Whether a method of the class, or of its bases below nn.Module, reads an attribute or global that is ``word``, or
    calls an aten operation of that name."""

    def has(code: CodeType) -> bool:
        return word in code.co_names or any(has(c) for c in code.co_consts if isinstance(c, CodeType))

    own = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    functions = [value for base in own for value in vars(base).values() if inspect.isfunction(value)]
    return any(has(function.__code__) for function in functions if function.__name__ != "train")
