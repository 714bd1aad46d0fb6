"""Files and folders that are written whole or not at all, and files that are nothing but files."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bnre_exp.errors import UserError


@contextmanager
def replacing(path: Path, *, durable: bool = False, within: Path | None = None) -> Iterator[Path]:
    """Gives a path to write a file or a folder to, which takes the place of ``path`` when the block ends.

    Others see the old one or the new one, whole. After an error the old one is as it was, and the new one is gone.
    durable: wait until the disk has everything. within: folder for what is not finished, on the disk of ``path``; by
    default the folder of ``path``. Both folders are made if need be. Raises ``OSError`` where the disk refuses.
    """
    unique = uuid.uuid4().hex
    folder = within or path.parent
    new, old = folder / f".{path.name}.{unique}.new", folder / f".{path.name}.{unique}.old"
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        if durable:
            for part in [*new.rglob("*"), new] if new.is_dir() else [new]:
                _to_disk(part)
        _put(new, path, old)
        if durable:
            _to_disk(path.parent)
    finally:
        _remove(new)


def read_file(path: Path) -> bytes:
    """The content of a regular file. Raises ``OSError`` for anything else: a pipe would wait, a device never ends."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        return file.read()


def write_file(path: Path, content: bytes) -> None:
    """Write one file, and the folder it is in, whole or not at all. Raises ``UserError`` if the disk refuses."""
    if not path.name or path.is_dir():
        raise UserError(f"{str(path)!r} is no path of a file")
    try:
        with replacing(path) as new:
            new.write_bytes(content)
    except (OSError, ValueError) as error:  # ValueError: a path that is none
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _put(new: Path, path: Path, old: Path) -> None:
    """A folder with files in it cannot be replaced in one step, so the old one steps aside, and back if need be."""
    if not (new.is_dir() and path.is_dir()):
        os.replace(new, path)
        return
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot wait for a folder
            raise
    finally:
        os.close(descriptor)
