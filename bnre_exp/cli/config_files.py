"""The user's own config files: where they are, and what is wrong in one that Hydra cannot compose."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from bnre_exp.errors import UserError, first_line


def own_folder(arguments: Sequence[str]) -> Path | None:
    """The folder that ``--config-dir`` names. Raises ``UserError`` if there is none; Hydra would go on without it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", nargs="?")
    named = parser.parse_known_args(arguments)[0].config_dir
    if named is not None and not Path(named).is_dir():
        raise UserError(f"--config-dir {named}: there is no such folder.")
    return None if named is None else Path(named)


def refuse_unchosen(choices: Any) -> None:
    """A group that is null would compose, and leave the values of the schema, which no group file and no help names.

    choices: of Hydra, by group. Raises ``UserError``."""
    for group, choice in choices.items():
        if choice is None and "/" not in group and group not in ("experiment", "hydra"):
            raise UserError(f'{group}=null: expected a choice; "off" (in a file in quotes) is one of some groups.')


def mistake_in_files(error: BaseException, folders: Sequence[Path], words: Sequence[str]) -> UserError | None:
    """What a config file has that Hydra stumbled over; None if it was not that.

    words: the command's, which name the files that are looked at first: any others may have mistakes of their own."""
    words_of_files = ("defaults", "override ", "raised while composing")
    is_of_files = not isinstance(error, UserError) and any(text in str(error) for text in words_of_files)
    if not is_of_files and not isinstance(error, (yaml.YAMLError, UnicodeDecodeError)):
        return None
    choices = {choice for word in words for choice in word.partition("=")[2].split(",")}

    def is_other(folder: Path, file: Path) -> bool:
        return not any(file.relative_to(folder).with_suffix("").as_posix().endswith(f"/{name}") for name in choices)

    found = [(folder, file) for folder in folders for file in sorted(folder.rglob("*.yaml"))]
    files = (file for folder, file in sorted(found, key=lambda pair: is_other(*pair)))
    text = next((f"{file}: {reason}" for file in files for reason in _reasons(file)), None)
    return UserError(text) if text is not None else None


def _reasons(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
        read, written = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)  # which takes every word for text
    except UnicodeDecodeError:
        yield "it is no text in UTF-8."
        return
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        yield f"{place}it is not YAML: {getattr(error, 'problem', None) or first_line(error)}."
        return
    if not isinstance(read, (dict, type(None))):
        yield "it must name groups and fields, as in seed: 3."
        return
    defaults = read.get("defaults", []) if read else []
    if not isinstance(defaults, list):
        yield "defaults must be a list: a line of its own for each, beginning with -, as in - override /qat: default."
        return
    for entry, words in zip(defaults, written["defaults"] if defaults else []):
        if isinstance(entry, str) and " " in entry:
            yield f"{entry}: it lacks the colon of GROUP: CHOICE, as in override /qat: default."
        for name, value in entry.items() if isinstance(entry, dict) else []:
            if any(not isinstance(item, (str, type(None))) for item in (value if isinstance(value, list) else [value])):
                word = words[name]
                yield f'{name}: {word}: YAML reads {word} as no text; write it in quotes, {name}: "{word}".'
