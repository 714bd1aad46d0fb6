"""What the shell offers while a command is typed, after ``eval "$(bnre-exp -sc install=bash)"``.

Hydra offers groups, choices and names; of a field only its present value, and of words ``Optimizer.sgd``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from bnre_exp.cli.config_files import own_folder
from bnre_exp.config import Config

COMMAND = "bnre-exp"


def complete(arguments: Sequence[str], hydras: Callable[[], object]) -> int:
    """Print what may follow, or what installs completion. arguments: what follows ``-sc``, such as ``query=bash``;
    hydras: Hydra's own answer. Returns the exit status."""
    if not any(text.startswith("query=") for text in arguments):
        sys.argv[0] = COMMAND  # also where python -m bnre_exp made it: completing any python would do nothing
        hydras()
        return 0
    line = os.environ.get("COMP_LINE", "")
    word = line.split()[-1] if line.strip() and not line[-1].isspace() else ""
    offered = _offered(word)
    if offered is not None:
        sys.stdout.write(" ".join(offered) + "\n")
        return 0
    try:
        own = own_folder(line.split())
        sys.argv += ["--config-dir", str(own)] if own is not None else []
        hydras()
    except Exception:  # a mistake earlier in the line is told when it is run, not in the middle of typing
        return 1
    return 0


def _offered(word: str) -> list[str] | None:
    """Ways to go on with ``FIELD=`` or ``FIELD=ad``; None where Hydra knows better."""
    name, is_value, begun = word.partition("=")
    values = values_of(name.lstrip("+")) if is_value else None
    if values is None:
        return None
    start = "" if begun.startswith("[") else begun[: begun.rfind(",") + 1]  # values of a multirun
    return [f"{name}={start}{value}" for value in values if f"{start}{value}".startswith(begun)]


def values_of(name: str) -> list[str] | None:
    """All that a field takes where these are a few words; none for another list; None for any other field."""
    section: Any = Config
    *groups, last = name.split(".")
    for group in groups:
        section = next((item.default_factory for item in fields(section) if item.name == group), None)
        if not (isinstance(section, type) and is_dataclass(section)):
            return None
    kind = get_type_hints(section).get(last)
    is_optional = type(None) in get_args(kind)
    kind = get_args(kind)[0] if is_optional else kind
    if get_origin(kind) is list:
        words = _words(get_args(kind)[0])
        return [f"[{word}]" for word in [*words, ",".join(words)] if words]
    words = _words(kind)
    return [*words, *(["null"] if is_optional else [])] if words else None


def _words(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    return [member.name for member in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []
