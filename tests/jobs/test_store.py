"""The stage store: computed once, whole or not at all, checked when read, and room made without harm to who uses it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from bnre_exp.files import work_folder
from bnre_exp.jobs.store import ENTRY, Entry, Store

CONFIG = {"quant.weight_bits": 4}


def fill(text: str = "result"):
    def write(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "file.txt").write_text(text)

    return write


def compute(store: Store, stage: str = "qat", depends=None, text: str = "result") -> tuple[Entry, bool]:
    """The entry, and whether it had to be written."""
    with store.stage(stage, depends or {"bits": 4}) as slot:
        if slot.entry is not None:
            return slot.entry, False
        entry = slot.write(CONFIG, fill(text))
        assert entry is not None
        return entry, True


def test_a_result_is_found_again_by_all_that_it_depends_on(tmp_path):
    with Store(tmp_path) as store:
        entry, written = compute(store)
        assert written and (entry.folder / "deep" / "file.txt").read_text() == "result"
        assert entry.size == 6 and entry.config == CONFIG and entry.depends == {"bits": 4}
    with Store(tmp_path) as store:
        assert compute(store, depends={"bits": 4})[1] is False
        assert store.has("qat", {"bits": 4}) and not store.has("qat", {"bits": 3})
        assert not store.has("reest", {"bits": 4})
        assert compute(store, depends={"bits": 3})[1] is True
        assert compute(store, depends={"bits": 4, "code": "new"})[1] is True
        assert compute(store, depends={"code": "new", "bits": 4})[1] is False  # the order of keys means nothing
        assert len(store.entries()) == 3


def test_off_keeps_nothing(tmp_path):
    with Store(tmp_path / "store", mode="off") as store, store.stage("qat", {}) as slot:
        assert slot.entry is None and slot.partial is None and slot.write(CONFIG, fill()) is None
        assert not store.has("qat", {})
    assert not (tmp_path / "store").exists()


def test_refresh_computes_once_a_command(tmp_path):
    with Store(tmp_path) as store:
        compute(store, text="old")
    began = time.time()
    with Store(tmp_path, mode="refresh", since=began) as store:
        assert not store.has("qat", {"bits": 4})
        entry, written = compute(store, text="new")
        assert written and (entry.folder / "deep" / "file.txt").read_text() == "new"
        assert compute(store)[1] is False and store.has("qat", {"bits": 4})  # the next job of the sweep
    with Store(tmp_path) as store:
        assert compute(store)[0].created >= began and len(store.entries()) == 1


def test_refresh_takes_up_no_work_begun_before(tmp_path):
    def begin(store: Store) -> bool:
        with pytest.raises(RuntimeError), store.stage("qat", {}) as slot:
            found = (slot.partial / "epoch").exists()
            slot.partial.mkdir(parents=True, exist_ok=True)
            (slot.partial / "epoch").write_text("1")
            raise RuntimeError
        return found

    assert [begin(Store(tmp_path)) for _ in range(2)] == [False, True]
    refreshing = Store(tmp_path, mode="refresh", since=time.time() + 0.01)
    time.sleep(0.02)
    assert [begin(refreshing) for _ in range(2)] == [False, True]


def test_a_result_from_another_upstream_is_not_found(tmp_path):
    with Store(tmp_path) as store:
        with store.stage("qat", {}, upstream="one") as slot:
            slot.write(CONFIG, fill("from one"))
        with store.stage("qat", {}, upstream="two") as slot:
            assert slot.entry is None
            slot.write(CONFIG, fill("from two"))
        with store.stage("qat", {}, upstream="two") as slot:
            assert (slot.entry.folder / "deep" / "file.txt").read_text() == "from two"


def cut(entry: Entry) -> None:
    file = entry.folder / "deep" / "file.txt"
    file.write_bytes(file.read_bytes()[:-1])


def flip(entry: Entry) -> None:
    (entry.folder / "deep" / "file.txt").write_text("rEsult")


def lose(entry: Entry) -> None:
    (entry.folder / "deep" / "file.txt").unlink()


def change_record(entry: Entry) -> None:
    record = json.loads((entry.folder / ENTRY).read_text())
    record["config"]["quant.weight_bits"] = 5
    (entry.folder / ENTRY).write_text(json.dumps(record))


def cut_record(entry: Entry) -> None:
    (entry.folder / ENTRY).write_text('{"format": 1,')


@pytest.mark.parametrize("damage", [cut, flip, lose, change_record, cut_record], ids=lambda f: f.__name__)
def test_a_damaged_result_is_set_aside_and_computed_anew(tmp_path, damage, caplog):
    with Store(tmp_path) as store:
        damage(compute(store)[0])
        with caplog.at_level(logging.WARNING):
            entry, written = compute(store)
        assert written and (entry.folder / "deep" / "file.txt").read_text() == "result"
        assert "damaged" in caplog.text and len(list((tmp_path / "damaged").iterdir())) == 1
        assert compute(store)[1] is False
        assert store.remove_damaged() == 1 and not (tmp_path / "damaged").exists()


def test_a_computation_that_fails_leaves_nothing_but_its_partial_state(tmp_path):
    with Store(tmp_path) as store:
        with pytest.raises(RuntimeError), store.stage("qat", {"bits": 4}) as slot:
            slot.partial.mkdir(parents=True)
            (slot.partial / "epoch").write_text("1")
            raise RuntimeError
        with store.stage("qat", {"bits": 4}) as slot:
            assert slot.entry is None and (slot.partial / "epoch").read_text() == "1"

            def failing(folder: Path) -> None:
                (folder / "half").write_text("x")
                raise OSError(28, "No space left on device")

            assert slot.write(CONFIG, failing) is None and (slot.partial / "epoch").exists()
            assert slot.write(CONFIG, fill()) is not None and not slot.partial.exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_least_recently_used_go_first_and_what_is_in_use_stays(tmp_path):
    with Store(tmp_path, max_bytes=30) as store:
        for bits in (2, 3, 4):
            compute(store, depends={"bits": bits}, text="0123456789")
        for number, entry in enumerate(store.entries()):
            os.utime(entry.folder / ENTRY, (1000 + number, 1000 + number))
        compute(store, depends={"bits": 8}, text="0123456789")
        assert len(store.entries()) == 4  # this store's job may still need them
    with Store(tmp_path, max_bytes=30) as later, Store(tmp_path, max_bytes=30) as user:
        oldest = {"bits": 2}
        assert compute(user, depends=oldest)[1] is False  # now the one used last, and in use
        os.utime(later.entries()[-1].folder / ENTRY, (1, 1))
        compute(later, depends={"bits": 16}, text="0123456789")
        left = [entry.depends["bits"] for entry in later.entries()]
        assert 2 in left and 16 in left and len(left) == 3, left
    assert not any((tmp_path / "pins").rglob("*.lock"))


def test_pruning_by_age_takes_unfinished_work_too(tmp_path):
    with Store(tmp_path) as store:
        compute(store)
        with pytest.raises(RuntimeError), store.stage("fp32", {}) as slot:
            slot.partial.mkdir(parents=True)
            raise RuntimeError
    store = Store(tmp_path)
    assert store.evict(float("inf"), older_than=time.time() - 60) == [] and len(store.entries()) == 1
    assert len(store.evict(float("inf"), older_than=time.time() + 60)) == 1 and store.entries() == []
    assert list((tmp_path / "partial").iterdir()) == []


PROGRAM = """
import sys, time
from pathlib import Path
from bnre_exp.jobs.store import Store
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
with Store(folder) as store, store.stage("fp32", {"a": 1}, lambda who: print("waits for", who, flush=True)) as slot:
    print("inside", flush=True)
    if slot.entry is None:
        with open(folder / "computed", "a") as file:
            file.write("x")
        time.sleep(seconds)
        slot.write({}, lambda f: (f / "r").write_text("r"))
"""


def start(folder: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_one_process_computes_and_the_others_wait_for_it(tmp_path):
    processes = [start(tmp_path, 3) for _ in range(4)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert (tmp_path / "computed").read_text() == "x"
    assert sum("waits for process" in text for text in said) >= 1


@pytest.mark.slow
def test_when_the_one_that_computes_is_killed_another_takes_over(tmp_path):
    first = start(tmp_path, 600)
    assert first.stdout.readline() == "inside\n"
    second = start(tmp_path, 0)
    assert f"waits for process {first.pid} on " in second.stdout.readline()
    first.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=60)[0] == "inside\n" and second.returncode == 0
    assert (tmp_path / "computed").read_text() == "xx"
    assert Store(tmp_path).has("fp32", {"a": 1})


def test_an_entry_in_the_place_of_another_key_is_not_taken(tmp_path, caplog):
    with Store(tmp_path) as store:
        entry, _ = compute(store, depends={"bits": 4})
        other, _ = compute(store, depends={"bits": 3}, text="other")
    shutil.rmtree(entry.folder)
    os.replace(other.folder, entry.folder)
    with Store(tmp_path) as store:
        assert not store.has("qat", {"bits": 4}) and store.entries() == []
        entry, written = compute(store, depends={"bits": 4})
        assert written and (entry.folder / "deep" / "file.txt").read_text() == "result"
    assert "that of another result" in caplog.text and len(list((tmp_path / "damaged").iterdir())) == 1


def test_what_is_no_entry_makes_room_too(tmp_path):
    with Store(tmp_path) as store:
        cut_record(compute(store)[0])
    assert Store(tmp_path).evict(0.0) == [] and list((tmp_path / "entries").iterdir()) == []


def as_nobody(folder: Path, answer) -> None:
    """Three stages in a store, by a process that is not root, whom permissions do not bind."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    told, said = [], []
    logging.getLogger("bnre_exp").addHandler(handler := logging.Handler())
    handler.emit = lambda record: told.append(record.getMessage())
    with Store(folder) as store:
        for bits in (4, 3, 3):
            with store.stage("qat", {"bits": bits}) as slot:
                how = "found" if slot.entry else "kept" if slot.write(CONFIG, fill()) else "not kept"
                said.append(f"{bits} {how}, {'cannot' if slot.partial is None else 'can'} be resumed")
    answer.send((said, told))


def filled(folder: Path) -> None:
    with Store(folder) as store:
        compute(store)


def read_only(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def read_only_and_filled(folder: Path) -> None:
    filled(folder)
    read_only(folder)


def read_only_and_empty(folder: Path) -> None:
    folder.mkdir()
    read_only(folder)


def a_file_in_its_place(folder: Path) -> None:
    folder.write_text("")


def a_folder_that_cannot_be_made(folder: Path) -> None:
    folder.parent.chmod(0o555)


def another_users_lock(folder: Path) -> None:
    """The folders are the group's, and one lock is not to be written; a lock can be held all the same."""
    filled(folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o644)
    (lock,) = (folder / "locks").glob("*.lock")
    lock.chmod(0o444)


def a_lock_that_cannot_be_opened(folder: Path) -> None:
    another_users_lock(folder)
    (lock,) = (folder / "locks").glob("*.lock")
    lock.chmod(0)


NOTHING_KEPT = ["3 not kept, cannot be resumed"] * 2


@pytest.mark.parametrize(
    ("prepare", "expected", "warnings"),
    [
        (read_only_and_filled, ["4 found, cannot be resumed", *NOTHING_KEPT], 1),
        (read_only_and_empty, ["4 not kept, cannot be resumed", *NOTHING_KEPT], 1),
        (a_file_in_its_place, ["4 not kept, cannot be resumed", *NOTHING_KEPT], 1),
        (a_folder_that_cannot_be_made, ["4 not kept, cannot be resumed", *NOTHING_KEPT], 1),
        (another_users_lock, ["4 found, can be resumed", "3 kept, can be resumed", "3 found, can be resumed"], 0),
        (a_lock_that_cannot_be_opened, ["4 found, cannot be resumed", *NOTHING_KEPT], 1),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_store_that_cannot_be_written_is_read_and_that_is_told_once(prepare, expected, warnings):
    with tempfile.TemporaryDirectory() as top:  # pytest's own folders are closed to others
        os.chmod(top, 0o755)
        folder = Path(top) / "store"
        prepare(folder)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=as_nobody, args=(folder, sender))
        process.start()
        sender.close()
        said, told = receiver.recv()
        process.join()
        for path in [Path(top), *Path(top).rglob("*")]:
            path.chmod(0o755)
    assert said == expected
    assert len(told) == warnings and all("cannot be written" in line and "store.dir" in line for line in told), told


def test_what_a_group_shares_can_be_written_by_it(tmp_path):
    before = os.umask(0o002)
    try:
        with Store(tmp_path) as store:
            compute(store)
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {oct(mode) for path, mode in modes.items() if path.is_dir()} == {"0o775"}
    assert {oct(mode) for path, mode in modes.items() if path.is_file()} == {"0o664"}


def killed_job(folder: Path) -> None:
    """One that is killed while it writes its second result, and has work in a folder for that."""

    def die(new: Path) -> None:
        (new / "half").write_text("x")
        with work_folder(folder):
            os.kill(os.getpid(), signal.SIGKILL)

    with Store(folder) as store:
        compute(store, "fp32", {"a": 1})
        with store.stage("ptq", {"a": 1}) as slot:
            slot.write(CONFIG, die)


def test_what_a_killed_job_left_is_swept_up_by_the_next_one(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed_job, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "tmp").iterdir()) and len(list((tmp_path / "locks").glob("*.json"))) == 1
    (tmp_path / "pins" / "fp32-x").mkdir(parents=True)  # as earlier versions left it
    (tmp_path / "pins" / "fp32-x" / "1.lock").touch()
    assert len(list(tmp_path.glob("bnre_exp-work-*"))) == 1
    with Store(tmp_path) as store, work_folder(tmp_path) as mine:
        compute(store)
        assert list(tmp_path.glob("bnre_exp-work-*")) == [mine]
        assert store.has("fp32", {"a": 1}) and not (tmp_path / "pins").exists()
        assert list((tmp_path / "tmp").iterdir()) == [] and list((tmp_path / "locks").glob("*.json")) == []
        locked = {path.stem for path in (tmp_path / "locks").glob("*.lock")}
        assert locked == {entry.folder.name for entry in store.entries()}  # not that of ptq
        assert len(store.evict(0.0)) == 1  # what the killed job needed, and not what this one does


def test_what_a_living_process_or_lately_another_host_left_stays(tmp_path):
    tmp = tmp_path / "tmp"
    with Store(tmp_path) as store:
        compute(store)
        with work_folder(tmp) as living:
            (living / "file").write_text("x")
            elsewhere, unmade = tmp / "bnre_exp-work-elsewhere-1", tmp / f"{living.name}.making"
            for folder in (elsewhere, unmade):
                folder.mkdir()
                (folder / "lock").touch()
            with Store(tmp_path) as other:
                compute(other)
            assert {path.name for path in tmp.iterdir()} == {living.name, elsewhere.name, unmade.name}
            for path in (elsewhere, elsewhere / "lock", unmade, unmade / "lock", living, living / "file"):
                os.utime(path, (1, 1))
            with Store(tmp_path) as other:
                compute(other)
            assert list(tmp.iterdir()) == [living]
