"""Files and folders are written whole or not at all, and what was there is as it was after an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bnre_exp import files
from bnre_exp.errors import UserError
from bnre_exp.files import held_if_free, lock_file, replacing, sweep_unfinished, unlock, write_file


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(target: Path, is_folder: bool, text: str, **how: object) -> None:
    with replacing(target, **how) as new:  # type: ignore[arg-type]
        if is_folder:
            new.mkdir()
        (new / "deep" if is_folder else new).write_text(text)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_the_new_one_takes_the_place_of_the_old(tmp_path: Path, is_folder: bool, durable: bool) -> None:
    target = tmp_path / "made" / "target"
    name = "made/target/deep" if is_folder else "made/target"
    for text in ("old", "new"):
        write(target, is_folder, text, durable=durable)
        assert contents(tmp_path) == {name: text}


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "user"])
def test_an_error_within_the_block_leaves_the_old(tmp_path: Path, is_folder: bool, error: BaseException) -> None:
    write(tmp_path / "target", is_folder, "old")
    before = contents(tmp_path)
    with pytest.raises(type(error)), replacing(tmp_path / "target") as new:
        if is_folder:
            new.mkdir()
        (new / "half" if is_folder else new).write_text("half")
        raise error
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


def test_an_old_folder_that_stepped_aside_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "target", True, "old")
    replace = os.replace

    def refusing(source: Path, target: Path) -> None:
        if source.suffix == ".new":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refusing)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path / "target", True, "new")
    assert contents(tmp_path) == {"target/deep": "old"}


def test_a_folder_is_no_place_for_a_file_nor_a_file_for_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "folder", True, "old")
    write(tmp_path / "file", False, "old")
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "folder", False, "new")
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "file", True, "new")
    assert contents(tmp_path) == {"folder/deep": "old", "file": "old"}


def test_what_is_not_finished_can_be_elsewhere(tmp_path: Path) -> None:
    with replacing(tmp_path / "entries" / "one", within=tmp_path / "tmp") as new:
        assert new.parent == tmp_path / "tmp" and not list((tmp_path / "entries").iterdir())
        new.write_text("whole")
    assert contents(tmp_path) == {"entries/one": "whole"}


def test_durable_waits_for_every_file_and_for_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: seen.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    write(tmp_path / "target", True, "text", durable=True)
    assert seen[0].endswith(".new/deep") and seen[1].endswith(".new") and seen[2] == str(tmp_path)
    assert len(seen) == 3
    write(tmp_path / "target", True, "text")
    assert len(seen) == 3


def test_write_file_says_why_it_cannot(tmp_path: Path) -> None:
    write_file(tmp_path / "new" / "file", b"text")
    assert contents(tmp_path) == {"new/file": "text"}
    with pytest.raises(UserError, match="no path of a file"):
        write_file(tmp_path / "new", b"")
    with pytest.raises(UserError, match="cannot be written: File exists"):
        write_file(tmp_path / "new" / "file" / "below", b"")
    with pytest.raises(UserError, match="cannot be written: embedded null byte"):
        write_file(tmp_path / "a\0b", b"")


def test_a_lock_is_held_alone_or_shared(tmp_path: Path) -> None:
    path = tmp_path / "made" / "lock"
    alone = lock_file(path)
    assert alone is not None and lock_file(path) is None and lock_file(path, shared=True, until=0.2) is None
    unlock(alone)
    shared = [lock_file(path, shared=True) for _ in range(2)]
    assert None not in shared and lock_file(path) is None
    for lock in shared:
        unlock(lock)  # type: ignore[arg-type]
    with held_if_free(path) as is_free, held_if_free(path) as again:
        assert is_free and not again
    with pytest.raises(FileNotFoundError):
        lock_file(tmp_path / "nowhere", create=False)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened, count = tmp_path / "lock", files._open_to_lock, iter(range(9))

    def removed_after_opening(path: Path, create: bool) -> int:
        descriptor = opened(path, create)
        if next(count) == 0:
            path.unlink()
        return descriptor

    monkeypatch.setattr(files, "_open_to_lock", removed_after_opening)
    assert lock_file(path) is not None and path.exists() and next(count) == 2


def test_a_lock_outlives_no_release_though_a_fork_has_it_open(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / "lock")
    assert lock is not None
    copy = os.dup(lock)  # as a forked worker's
    unlock(lock)
    assert lock_file(tmp_path / "lock") is not None
    os.close(copy)


def test_only_unfinished_files_are_swept_up(tmp_path: Path) -> None:
    with pytest.raises(KeyError), replacing(tmp_path / "a.json") as new:
        raise KeyError
    new.write_text("half")  # as if the process had been killed
    for name in (".hidden.new", "a.json", ".a.json.1.old"):
        (tmp_path / name).write_text("x")
    sweep_unfinished(tmp_path)
    assert set(contents(tmp_path)) == {".hidden.new", "a.json", ".a.json.1.old"}


def test_no_scratch_folder_is_made_that_outlives_a_kill() -> None:
    package = Path(files.__file__).parent
    made = [path for path in package.rglob("*.py") if "TemporaryDirectory(" in path.read_text()]
    assert made == []  # work_folder() is swept up by the next run
