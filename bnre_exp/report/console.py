"""Progress bars on the console."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Optional, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


class ConsoleProgress:
    """Wraps iterables in a bar each (a :class:`~bnre_exp.progress.Progress`); the bar goes when its loop ends.

    Where the console is no terminal nothing is drawn: the line a stage prints at its end is the progress there.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, iterable: Iterable[T], description: str, total: Optional[int] = None) -> Iterator[T]:
        if not self.console.is_terminal:
            yield from iterable
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as bars:
            yield from bars.track(iterable, total=total, description=description)
