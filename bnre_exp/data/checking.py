"""Targets that come in files, looked at before anything is trained; the pixels of their images are not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bnre_exp.data.items import item_name, reading_problem
from bnre_exp.data.listed import target_reader
from bnre_exp.data.samples import TargetKind, read_target
from bnre_exp.digests import digest
from bnre_exp.errors import UserError
from bnre_exp.files import replacing
from bnre_exp.progress import Progress


def check_targets(
    source: Any, indices: Sequence[int], kind: TargetKind, num_classes: int | None, contents: str, folder: Path | None,
    progress: Progress, name: str,
) -> None:  # fmt: skip
    """Raise ``UserError`` naming the items of a dataset whose targets are wrong, where these come in files.

    contents: digest of the files; with it, ``folder`` remembers what was found right.
    """
    read = target_reader(source)
    if read is None or kind.labels is None:
        return
    known = folder / digest(["targets", kind.name, num_classes, contents]) if folder is not None else None
    if known is not None and known.exists():
        return
    wrong: dict[int, str] = {}
    for index in progress(indices, f"checking the targets of the {name} images", len(indices)):
        problem = reading_problem(lambda index: read_target(*read(index), kind, num_classes), index)
        if problem is not None:
            wrong[index] = problem.removeprefix("dataset: ").rstrip(".")
    if wrong:
        first = "; ".join(f"item {item_name(source, index)}: {reason}" for index, reason in list(wrong.items())[:3])
        raise UserError(f"dataset: {len(wrong)} of {len(indices)} targets are wrong: {first}. Repair or remove them.")
    if known is not None:
        with suppress(OSError), replacing(known) as new:  # a folder that may only be read
            new.write_text("")
