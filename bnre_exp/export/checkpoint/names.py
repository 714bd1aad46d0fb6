"""Names in checkpoints: of variables, of paths, and of what the user's own code defines."""

from __future__ import annotations

import keyword
from collections import namedtuple
from typing import Any

from bnre_exp.errors import UserError


def is_name(text: Any) -> bool:
    """Whether it can be a variable of generated source text."""
    return isinstance(text, str) and text.isidentifier() and not keyword.iskeyword(text)


def is_path(text: Any) -> bool:
    """Whether it is a path of submodules that cannot break out of a quoted string."""
    parts = text.split(".") if isinstance(text, str) else [""]
    return all(part and part.isprintable() and not set(part) & set('"\\') for part in parts)


def qualified_name(thing: Any) -> str:
    """``module.name`` of a function or class; of a class from :func:`equivalent_class`, the one it stands for."""
    if fields_of(thing) is not None and "_stands_for" in vars(thing):
        return str(thing._stands_for)
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', repr(thing))}"


def fields_of(thing: Any) -> tuple[str, ...] | None:
    """The fields of a named tuple's class, None for anything else."""
    fields = getattr(thing, "_fields", None) if isinstance(thing, type) and issubclass(thing, tuple) else None
    return fields if isinstance(fields, tuple) else None


def equivalent_class(name: str, fields: tuple[str, ...]) -> type:
    """A class of named tuples with these fields, in place of the user's own ``name``, whose code is not there.

    Raises ``UserError`` for names that are none: torch.fx and ``namedtuple`` paste them into source text.
    """
    own_name = name.rpartition(".")[2]
    if not all(map(is_name, (own_name, *fields))) or len(set(fields)) < len(fields):
        raise UserError(f"{name!r} with the fields {fields!r} is no class of named tuples")
    create: Any = namedtuple  # whose fields no type checker could know
    kind: type = create(own_name, fields, module=__name__)
    type.__setattr__(kind, "_stands_for", name)  # no field begins with an underscore
    return kind
