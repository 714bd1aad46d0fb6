"""The task that a configuration names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from bnre_exp.errors import UserError
from bnre_exp.targets import call_target, resolve_target
from bnre_exp.tasks.task import Headline, Task

NEEDED = ("feed", "samples", "loss", "meter", "compared", "agreement", "check_output", "check_labels")


def build_task(target: str, kwargs: Mapping[str, Any] | None = None) -> Task:
    """What the dotted path ``target`` returns for ``kwargs``. Raises ``UserError`` unless it is a task."""
    task = call_target(resolve_target(target, "task._target_"), target, "task.kwargs", kwargs or {})
    missing = [name for name in NEEDED if not callable(getattr(task, name, None))]
    missing += [] if isinstance(getattr(task, "headline", None), Headline) else ["headline"]
    if missing:
        raise UserError(
            f"task._target_={target} gives a {type(task).__name__} without {', '.join(missing)}; "
            "bnre_exp/tasks/task.py says what a task has."
        )
    if not re.fullmatch(r"[A-Za-z][\w.-]*", task.headline.name):
        raise UserError(
            f"task._target_={target}: its headline metric is called {task.headline.name!r}; expected a letter, then "
            "letters, digits, _, . and -, as MLflow and file names take them. What people read is its label."
        )
    return cast(Task, task)
