"""Run folders: who holds them, how they ended, and which one a command goes on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from bnre_exp.errors import UserError
from bnre_exp.files import lock_file
from bnre_exp.jobs import folders
from bnre_exp.jobs.folders import (
    FAILED,
    FINISHED,
    KILLED,
    RUNNING,
    claim,
    find_abandoned,
    find_unfinished,
    held_if_dead,
    is_alive,
    read_record,
    recorded,
    set_aside,
)
from bnre_exp.jobs.sweep import close_if_dead
from bnre_exp.tracking.filesystems import is_on_network

PROGRAM = """
import sys, time
from pathlib import Path
from bnre_exp.jobs.folders import claim, recorded
folder = Path(sys.argv[1])
with claim(folder), recorded(folder, "id", "label") as record:
    print("running", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def process(tmp_path):
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "runs" / "live")], stdout=subprocess.PIPE, text=True
    )
    assert started.stdout.readline() == "running\n"
    yield started
    started.kill()
    started.wait()


@pytest.fixture
def impatient(monkeypatch):
    """A folder counts as held by a run as soon as its lock is: nobody looks here for a moment only."""

    def locked(path, *, until=0.0, **how):
        return lock_file(path, until=until and min(until, 0.1), **how)

    monkeypatch.setattr(folders, "lock_file", locked)


def leave(folder: Path, status: str, identity: str = "id") -> None:
    with claim(folder), recorded(folder, identity, "label") as record:
        record.status = status


def test_a_run_is_alive_until_its_process_is_gone_however_it_went(tmp_path, process, impatient):
    runs = tmp_path / "runs"
    live = runs / "live"
    assert is_alive(live) and read_record(live).status == RUNNING
    assert find_abandoned([runs]) == [] and find_unfinished(runs, "id") is None
    with pytest.raises(UserError, match="another process runs there"), claim(live):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_alive(live) and read_record(live).status == RUNNING
    assert find_abandoned([runs, tmp_path / "nowhere"]) == [live]
    assert find_unfinished(runs, "id") == live and find_unfinished(runs, "other") is None


def test_one_waits_for_the_end_of_the_other(tmp_path, process, impatient):
    live, said = tmp_path / "runs" / "live", threading.Event()

    def kill_it() -> None:
        said.wait(30)
        process.kill()

    killer = threading.Thread(target=kill_it)
    killer.start()
    with claim(live, said.set):
        assert process.wait(timeout=10) == -signal.SIGKILL
    killer.join()


def test_the_newest_interrupted_one_is_gone_on_with(tmp_path):
    for name, status in (("1", KILLED), ("2", KILLED), ("3", FINISHED), ("4", FAILED)):
        leave(tmp_path / name, status)
    assert find_unfinished(tmp_path, "id") == tmp_path / "2"
    started = read_record(tmp_path / "2").started
    leave(tmp_path / "2", FINISHED)
    assert read_record(tmp_path / "2").started == started and find_unfinished(tmp_path, "id") == tmp_path / "1"
    (tmp_path / "1" / "run.json").write_text('{"identity": "id", "sta')
    assert read_record(tmp_path / "1") is None and find_unfinished(tmp_path, "id") is None


def test_what_another_run_left_is_kept_under_another_name(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "metrics.jsonl").write_text(text)
        set_aside(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert [(tmp_path / f"earlier-{n}" / "metrics.jsonl").read_text() for n in (1, 2)] == ["first", "second"]


def test_many_may_look_at_once_and_none_is_taken_for_the_run(tmp_path):
    leave(tmp_path / "dead", RUNNING)
    seen: list[bool] = []

    def look() -> None:
        seen.extend(is_alive(tmp_path / "dead") for _ in range(300))

    lookers = [threading.Thread(target=look) for _ in range(4)]
    for looker in lookers:
        looker.start()
    for looker in lookers:
        looker.join()
    assert seen == [False] * 1200


def test_a_dead_run_is_closed_by_one_who_holds_it(tmp_path, process):
    live = tmp_path / "runs" / "live"
    with held_if_dead(live) as is_held:
        assert not is_held
    close_if_dead(live)
    assert read_record(live).status == RUNNING
    process.kill()
    process.wait()
    with held_if_dead(live) as is_held:
        assert is_held and is_alive(live)
        close_if_dead(live)
        assert read_record(live).status == RUNNING  # somebody is at it
    close_if_dead(live)
    assert read_record(live).status == KILLED


def test_what_a_killed_process_left_unfinished_goes_when_the_folder_is_claimed(tmp_path):
    left, other = tmp_path / f".run.json.{uuid.uuid4().hex}.new", tmp_path / ".run.json.mine.new"
    for path in (left, other):
        path.write_text("{")
    leave(tmp_path, FINISHED)
    assert not left.exists() and other.exists() and read_record(tmp_path).status == FINISHED


def test_a_run_of_another_user_is_alive_until_it_is_known_to_be_dead(tmp_path, process, monkeypatch):
    live, opened = tmp_path / "runs" / "live", os.open

    def as_another(path, flags, *mode):
        if str(path).endswith("run.lock") and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", as_another)  # rw-r--r--
    assert is_alive(live) and find_abandoned([tmp_path / "runs"]) == []
    process.kill()
    process.wait()
    assert not is_alive(live)
    close_if_dead(live)
    assert read_record(live).status == KILLED
    monkeypatch.setattr(os, "open", lambda *given: as_another(given[0], os.O_RDWR))  # rw-------
    assert is_alive(live)
    with held_if_dead(live) as is_held:
        assert not is_held


MOUNTS = """\
22 1 259:2 / / rw,relatime - ext4 /dev/root rw
30 22 0:25 / /proc rw - proc proc rw
40 22 0:50 / /home rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2
41 40 259:3 / /home/local rw - xfs /dev/sdb rw
42 22 0:51 / /my\\040data rw - lustre 10.0.0.1@tcp:/data rw
"""


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("/var/x", False), ("/home/me/out", True), ("/homes", False), ("/home/local/x", False), ("/my data/x", True)],
)
def test_network_file_systems_are_told_by_the_innermost_mount(folder, expected, tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert is_on_network(Path(folder), mounts) is expected
    assert is_on_network(Path(folder), tmp_path / "nowhere") is False
