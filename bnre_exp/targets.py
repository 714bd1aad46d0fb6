"""Dotted paths of the user's own networks and datasets, turned into calls with messages that name the setting."""

from __future__ import annotations

import inspect
import pkgutil
import traceback
from collections.abc import Callable, Mapping
from typing import Any, cast

from bnre_exp.errors import UserError


def resolve_target(target: str, setting: str) -> Callable[..., Any]:
    """The callable that a dotted path such as ``mynet.blocks.MyNet`` names; its module is imported.

    ``setting`` is the name the user types, such as ``model._target_``. Raises UserError where the path is malformed,
    a module or attribute of it does not exist, a module that it imports is missing, or it names no callable.
    """
    try:
        found = pkgutil.resolve_name(target)
    except ModuleNotFoundError as error:
        own = error.name is not None and (target.replace(":", ".") + ".").startswith(error.name + ".")
        reason = f"there is no module {error.name}" if own else f"its module needs {error.name}, which is not installed"
        raise UserError(
            f"{setting}={target}: {reason}. Expected the dotted path of a callable that can be imported from the "
            "working directory or the environment; check the spelling, install the package, or set PYTHONPATH."
        ) from error
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name != "__getattr__"]
        is_path = frames[-1].filename == pkgutil.__file__  # the module itself was imported
        if is_path and isinstance(error, ValueError):
            raise UserError(f"{setting}={target!r} is no dotted path; expected something like mynet.MyNet.") from error
        if is_path and isinstance(error, AttributeError):
            raise UserError(
                f"{setting}={target}: {error}. The module exists; check the spelling of what follows it."
            ) from error
        raise UserError(f"{setting}={target}: importing its module raised {what_failed(error)}") from error
    if not callable(found):
        raise UserError(
            f"{setting}={target} is a {type(found).__name__}, not a callable; expected a class or function, "
            "such as mynet.MyNet."
        )
    return cast(Callable[..., Any], found)


def call_target(
    function: Callable[..., Any], target: str, setting: str, kwargs: Mapping[str, Any], **given: Any
) -> Any:
    """Call ``function(**given, **kwargs)``; raises UserError naming ``setting`` where the signature does not fit, and
    ``target`` with the place in the user's code where that raises something."""
    doubled = sorted(set(given) & set(kwargs))
    if doubled:
        raise UserError(f"{setting} holds {', '.join(doubled)}, which the framework passes itself; remove it there.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        signature = None
    try:
        if signature is not None:
            signature.bind(**given, **kwargs)
    except TypeError as error:
        raise UserError(
            f"{setting}={dict(kwargs)} does not fit {target}{signature}: {error}. Give the arguments it takes, "
            f"as in +{setting}.NAME=VALUE."
        ) from error
    try:
        return function(**given, **kwargs)
    except UserError:
        raise
    except Exception as error:
        if target.startswith("bnre_exp."):
            raise  # a defect of ours
        raise UserError(f"{setting.partition('.')[0]}._target_={target} raised {what_failed(error)}") from error


def what_failed(error: Exception) -> str:
    """What a user's code raised, and where."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = f": {error}" if str(error) else ""
    return f"{type(error).__name__}{text} ({place.filename}, line {place.lineno}). Call it in Python to see how."
