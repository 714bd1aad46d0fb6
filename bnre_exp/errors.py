"""Exceptions whose message is all that a user needs: the command line shows them without a stack trace."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong. The message says what was wrong, what was expected and what to do."""


class TrainingDivergedError(UserError):
    """The training loss is no longer finite."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""
