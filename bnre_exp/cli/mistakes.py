"""What the command line says when something went wrong, and its exit status. Knows OmegaConf's errors, not Hydra."""

from __future__ import annotations

import difflib
import errno
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, ValidationError

from bnre_exp.cli.launch import how_stopped, stop_status
from bnre_exp.config import Config, LayerOverride
from bnre_exp.credentials import redact
from bnre_exp.errors import UserError

SEE_HELP = "python -m bnre_exp --help lists all fields."
_FULL_DISK = ("no space left on device", "database or disk is full", "disk quota exceeded")


def exit_status(error: BaseException) -> int:
    """2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM, what a SystemExit says, else 1."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return stop_status(error)
    return 2 if isinstance(error, UserError) else 1


def explain_failure(error: BaseException, log_file: Path | None) -> str:
    """The message for an error that ended a job; with the traceback only where the defect is ours. What is a credential
    in a URL is left out."""
    return redact(_explanation(error, log_file))


def _explanation(error: BaseException, log_file: Path | None) -> str:
    if isinstance(error, UserError):
        return f"Error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return how_stopped(error)
    if is_full_disk(error):
        return f"Error: the disk is full, {_full_folder(error, log_file)}. Free some space and run again."
    lines = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
    log = f" The log is {log_file}." if log_file is not None else ""
    return f"{lines}\nThis is unexpected, and likely a defect of bnre_exp.{log} {type(error).__name__}: {error}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_full_disk(error: BaseException) -> bool:
    """Whether the error, or one that it follows from, says that a disk or quota is full."""
    # safetensors and SQLite raise their own classes, which say so in words only
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(words in str(cause).lower() for words in _FULL_DISK)
        for cause in _causes(error)
    )


def _full_folder(error: BaseException, log_file: Path | None) -> str:
    names = [cause.filename for cause in _causes(error) if isinstance(cause, OSError) and cause.filename]
    if names:
        return f"in {Path(str(names[0])).absolute().parent}"
    return f"in {log_file.parent}" if log_file is not None else "in runtime.output_dir"


def explain_choice(missing: str, options: Sequence[str]) -> str:
    """``missing``: "model/resnet19", a choice that the group does not have."""
    group, _, choice = missing.rpartition("/")
    if not group:
        return f"there is no config file {choice!r} in the config folder."
    if not options:
        return f"{group}={choice}: there is no such config group or choice.{_did_you_mean(group)} {SEE_HELP}"
    near = difflib.get_close_matches(choice, options, n=1)
    hint = f" Did you mean {group}={near[0]}?" if near else ""
    return f"{group}={choice}: the group {group} has no such choice.{hint} Choices: {', '.join(sorted(options))}."


def explain_configuration(error: BaseException) -> str:
    """What is wrong in an override or a config file, from the error of Hydra or OmegaConf that found it."""
    causes = list(_causes(error))
    texts = [str(cause) for cause in causes]
    inner = next((cause for cause in causes if getattr(cause, "full_key", None)), None)
    name = str(getattr(inner, "full_key", "") or "")
    override = _search(r"Error merging override '?([^\n]+?)'?$", texts) or ""
    unknown = _unknown_name(texts, name, override)
    if unknown == "experiment":
        return "experiment: its file has to begin with the line # @package _global_, and then name groups and fields."
    if unknown:
        return f"{unknown}: there is no such field or config group.{_did_you_mean(unknown)} {SEE_HELP}"
    if override.startswith("~"):
        return f"{override}: a field cannot be removed; give it a value, or null where its type allows that."
    if isinstance(inner, MissingMandatoryValue):
        return f"{name} has no value (???): give it one, {name}=VALUE."
    if isinstance(inner, (InterpolationResolutionError, ValidationError)):
        is_word = re.search(r"'(False|True)', expected one of", str(inner))
        quotes = ' YAML reads off as false; in a file, write "off".' if is_word else ""
        return f"{override or name}: {_first_line(str(inner))}.{quotes}{_meaning(name)}"
    return _explain_override(error, _first_line(texts[0]))


def _unknown_name(texts: Sequence[str], name: str, override: str) -> str | None:
    """The name that the schema does not have, if that is what the errors say."""
    target = _search(r"Could not (?:override|delete from config\.) '([^'\n]+)'", texts)
    key = _search(r"Key '([^'\n]+)' (?:is )?not in ", texts)
    if target is None and override and key is not None and not override.startswith("~"):
        target = override.partition("=")[0].lstrip("+")
    if target is None:
        return (name or key) if key is not None else None
    # model={a: 1} names the field that was written, and OmegaConf the key in it
    return target if key is None or target.rpartition(".")[2] == key else f"{target}.{key}"


def _explain_override(error: BaseException, text: str) -> str:
    written = getattr(error, "override", None)
    if written in ("onnx", "store", "sync", "compare"):
        return f"{written!r} is not understood: the command is bnre-exp-{written}."
    if written is not None:
        return f"{written!r} is not understood: write GROUP=CHOICE or FIELD=VALUE. {SEE_HELP}"
    if text.startswith("Ambiguous value"):
        return f"{text}: several values make a multirun; add -m, or write a list as [a,b]."
    if text.startswith(("Multiple values", "Could not append")):
        return f"{text}: write it without the +."
    return f"{text}. {SEE_HELP}"


def _search(pattern: str, texts: Sequence[str]) -> str | None:
    for text in texts:
        match = re.search(pattern, text, re.MULTILINE)
        if match:
            return match.group(1).strip()
    return None


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].strip().rstrip(".") if text.strip() else "unknown reason"


def _fields(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every name the user can type, with its documentation; not the old ones."""
    for item in fields(section):
        if item.metadata["is_old"]:
            continue
        yield prefix + item.name, item.metadata["doc"]
        factory = item.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            yield from _fields(factory, f"{prefix}{item.name}.")


def _did_you_mean(name: str) -> str:
    names = [known for known, _ in [*_fields(), *_fields(LayerOverride, "quant.overrides.")]]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.75)
    last = name.rpartition(".")[2]
    near = [known for known in near if known != name]
    near += [known for known in names if known.rpartition(".")[2] == last and known not in near]
    return f" Did you mean {' or '.join(near[:3])}?" if near else ""


def _meaning(name: str) -> str:
    doc = dict(_fields()).get(name)
    return f" It means: {doc}." if doc else ""
