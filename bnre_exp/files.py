"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from bnre_exp.errors import UserError


def write_file(path: Path, content: bytes) -> None:
    """Write one file, and the folder it is in, whole or not at all. Raises ``UserError`` if the disk refuses."""
    if not path.name or path.is_dir():
        raise UserError(f"{str(path)!r} is no path of a file")
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        os.replace(new, path)
    except (OSError, ValueError) as error:  # ValueError: a path that is none
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)
