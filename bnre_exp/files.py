"""Files and folders that are written whole or not at all, and files that are nothing but files; locks of files; folders
for work that is thrown away.

A lock is the file system's: it holds across processes and, on most shared disks, across hosts, and it ends with the
process that held it, however that died.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bnre_exp.errors import UserError

STALE = 24 * 3600.0  # seconds after which what another host left is removed: its locks may not be seen here
WORK, MAKING, LOCK = "bnre_exp-work", ".making", "lock"
BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


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


def lock_file(path: Path, *, shared: bool = False, create: bool = True, until: float | None = 0.0) -> int | None:
    """Lock a file, and return the descriptor that :func:`unlock` takes; None if others hold it.

    shared: any number may hold it so. create: make the file (and its folder) if need be. until: how long to try
    [seconds]; None: until it is free. A file that this user may only read can be locked too. Raises ``OSError`` where
    it cannot be opened.
    """
    started = time.monotonic()
    while True:
        descriptor = _open_to_lock(path, create)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in BUSY:
                raise
        else:  # it was removed by the one that held it
            os.close(descriptor)
            continue
        if until is not None and time.monotonic() - started >= until:
            return None
        time.sleep(0.1)


def unlock(descriptor: int) -> None:
    """Give a lock back, also where a forked process still has the file open."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def held_if_free(path: Path, create: bool = True) -> Iterator[bool]:
    """True if nobody holds the lock of a file; then nobody else does while the block lasts. False also where this user
    may not open it, or it is not there and is not to be made."""
    try:
        descriptor = lock_file(path, create=create)
    except OSError:
        descriptor = None
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            unlock(descriptor)


def _open_to_lock(path: Path, create: bool) -> int:
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:  # for writing if possible: over NFS only that can be locked alone
        return os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    except OSError:
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY)
        raise


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def work_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder for work that is thrown away when the block ends, in ``parent`` (default: the system's temporary
    folder); first those go that killed processes left there. Raises ``OSError`` where the disk refuses."""
    mode = 0o700 if parent is None else 0o777  # a store may be a group's
    parent = parent or Path(tempfile.gettempdir())
    sweep_work(parent)
    folder = parent / f"{WORK}-{socket.gethostname()}-{uuid.uuid4().hex}"
    making = parent / f"{folder.name}{MAKING}"  # a folder without a lock would be taken for a dead one's
    parent.mkdir(parents=True, exist_ok=True)
    making.mkdir(mode)
    held = lock_file(making / LOCK)
    os.replace(making, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            unlock(held)


def sweep_work(parent: Path) -> None:
    """Remove the work folders that processes left in ``parent`` when they were killed. One of another host, whose locks
    may not be seen here, must be a day old as well."""
    for folder in parent.glob(f"{WORK}-*"):
        is_here = folder.name.rpartition("-")[0] == f"{WORK}-{socket.gethostname()}"
        is_made = not folder.name.endswith(MAKING)
        with held_if_free(folder / LOCK, create=False) as is_free:
            if (is_free or not is_made) and ((is_here and is_made) or is_stale(folder)):
                shutil.rmtree(folder, ignore_errors=True)


def sweep_unfinished(folder: Path) -> None:
    """Remove what :func:`replacing` of a killed process left in a folder; for one who holds the folder alone."""
    for left in folder.glob(f".*.{'[0-9a-f]' * 32}.new"):
        _remove(left)


def newest(folder: Path) -> float:
    """When the newest file in a folder was written (seconds since 1970); now, if there is none."""
    times = []
    for path in [folder, *folder.rglob("*")]:
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times, default=time.time())


def is_stale(folder: Path) -> bool:
    """Whether nothing was written in a folder for a day."""
    return newest(folder) < time.time() - STALE


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
