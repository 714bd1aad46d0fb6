"""How long work reports its progress: the stages wrap their loops in a function that the caller supplies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wraps an iterable: yields its items unchanged and shows how many of ``total`` (None: unknown) are done."""

    def __call__(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]: ...


def no_progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Show nothing: what library functions use unless told otherwise."""
    return iterable
