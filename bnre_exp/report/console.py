"""Progress bars on the console."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


class ConsoleProgress:
    """Wraps iterables in a bar each (a :class:`~bnre_exp.progress.Progress`); the bar goes when its loop ends.

    Where the console is no terminal nothing is drawn: the line a stage prints at its end is the progress there.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        if not self.console.is_terminal:
            yield from iterable
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as bars:
            # As a generator: rich would ask anything else for its length, which not every loader can tell.
            yield from bars.track((item for item in iterable), total=total, description=description)


class PrefixedLines(io.TextIOBase):
    """A text stream that puts ``prefix`` before every line: whose line it is, where several jobs share a terminal."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self._stream, self._prefix, self._rest = stream, prefix, ""

    def write(self, text: str) -> int:
        """Write whole lines, each in one piece; what follows the last one waits for its end."""
        *lines, self._rest = (self._rest + text).split("\n")
        self._stream.write("".join(f"{self._prefix}{line}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()
