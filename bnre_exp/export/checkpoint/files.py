"""The two files of a checkpoint: written whole or not at all, read with every byte checked."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from bnre_exp.errors import UserError
from bnre_exp.files import read_file, replacing

FORMAT, VERSION = "bnre_exp.folded", 3
READABLE = (1, 2, 3)  # 1 had no packed tensors, 2 did not say whether scales are per channel
NETWORK, WEIGHTS = "network.json", "weights.safetensors"


def write_checkpoint(path: Path, document: dict[str, Any], weights: bytes) -> None:
    """Write the folder ``path``, replacing a checkpoint that is there.

    Raises ``UserError`` where something else is there, or the disk refuses; what was there is then unchanged.
    """
    path = Path(os.path.realpath(path))
    check_replaceable(path)
    header = {"format": FORMAT, "version": VERSION, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    text = _one_line_an_entry({**header, **document})
    try:
        with replacing(path) as new:
            new.mkdir()
            (new / WEIGHTS).write_bytes(weights)
            (new / NETWORK).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"The checkpoint {path} cannot be written: {error.strerror or error}. Free space there, or give another "
            "folder."
        ) from error


def _one_line_an_entry(document: dict[str, Any]) -> str:
    """JSON in which each node, module and tensor has a line of its own, for readers and for diff."""
    parts = []
    for key, value in document.items():
        if isinstance(value, dict):
            lines = [f"{json.dumps(name)}: {json.dumps(entry, allow_nan=False)}" for name, entry in value.items()]
        elif isinstance(value, list):
            lines = [json.dumps(entry, allow_nan=False) for entry in value]
        else:
            lines = []
        body = json.dumps(value, allow_nan=False)
        if lines:
            body = body[0] + "\n  " + ",\n  ".join(lines) + "\n " + body[-1]
        parts.append(f" {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def check_replaceable(path: Path) -> None:
    """Raise ``UserError`` unless ``path`` is free, an empty folder or a checkpoint of ours and nothing else."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; expected a folder to write the checkpoint to. Give another path.")
    names = {entry.name for entry in path.iterdir()}
    if not names:
        return
    if not names <= {NETWORK, WEIGHTS} or not _is_ours(path):
        raise UserError(
            f"{path} holds other files than a checkpoint ({', '.join(sorted(names)[:5])}), which saving would delete. "
            "Give another folder, or empty this one."
        )


def _is_ours(path: Path) -> bool:
    try:
        document = json.loads(read_file(path / NETWORK))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT


def read_checkpoint(path: Path) -> tuple[dict[str, Any], bytes]:
    """The content of the JSON file and of the safetensors file. Raises ``UserError`` unless both are whole and ours."""
    contents = {}
    for name in (NETWORK, WEIGHTS):
        try:
            contents[name] = read_file(path / name)
        except OSError as error:
            raise UserError(
                f"{path / name} cannot be read: {error.strerror or error}. Expected the folder that save_folded wrote, "
                f"with {NETWORK} and {WEIGHTS} in it."
            ) from error
    try:
        document = json.loads(contents[NETWORK])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path / NETWORK} is not JSON ({error}): damaged, or not ours. Save it again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path / NETWORK} was not written by save_folded: its format is not {FORMAT!r}.")
    if document.get("version") not in READABLE:
        raise UserError(
            f"{path / NETWORK} has version {document.get('version')!r}; this bnre_exp reads up to {VERSION}. Load it "
            "with the bnre_exp that wrote it, or save it again."
        )
    if hashlib.sha256(contents[WEIGHTS]).hexdigest() != document.get("weights_sha256"):
        raise UserError(
            f"{path / WEIGHTS} is not the file that {NETWORK} was written with (its SHA-256 differs): cut short, "
            "damaged, or from another checkpoint. Copy both files again, or save again."
        )
    return document, contents[WEIGHTS]
