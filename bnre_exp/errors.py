"""Exceptions whose message is all that a user needs: the command line shows them without a stack trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def first_line(error: BaseException) -> str:
    """The first line that an exception of a library says, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def few(names: Sequence[str]) -> str:
    """The first five of many names, for a message."""
    return ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number of things, for a message: "1 epoch", "2 epochs"."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


class UserError(ValueError):
    """Something the user gave is wrong. The message says what was wrong, what was expected and what to do."""


class TrainingDivergedError(UserError):
    """The training loss is no longer finite."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


class JobFailed(Exception):
    """A job of a sweep failed, in a process of its own, and has said why: an exception that survives the way back."""


class SweepFailed(Exception):
    """Jobs of a sweep failed; each has said why, and its record holds it. folder: of the sweep."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder
