"""The commands around the store."""

from __future__ import annotations

import os
import time

import pytest

from bnre_exp.cli import compare_runs
from bnre_exp.cli import store_command as command
from bnre_exp.jobs.store import ENTRY, Store
from bnre_exp.report.comparison import RunRow


@pytest.fixture
def folder(tmp_path):
    with Store(tmp_path / "store") as store:
        for stage, config in (
            ("fp32", {}), ("qat", {"quant.weight_bits": 3, "qat.lr": 0.01}), ("qat", {"quant.weight_bits": None}),
        ):  # fmt: skip
            known = {"model.name": "resnet18", "dataset._target_": "bnre_exp.data.digits", **config}
            with store.stage(stage, known) as slot:
                slot.write(known, lambda folder: (folder / "file").write_bytes(b"x" * 2_000_000))
    return tmp_path / "store"


def test_list_shows_in_which_settings_results_differ(folder, capsys):
    assert command.main(["--dir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.count("resnet18 on digits") == 3 and "3 results, 0.01 GB" in said
    assert "quant.weight_bits=3 qat.lr=0.01" in said and "quant.weight_bits=null" in said and said.count("qat.lr") == 1


def test_prune_takes_what_it_is_told_to(folder, capsys):
    (oldest, *_) = Store(folder).entries()
    os.utime(oldest.folder / ENTRY, (time.time() - 10 * 86400,) * 2)
    with pytest.raises(SystemExit):
        command.main(["prune", "--dir", str(folder)])
    assert "say what goes" in capsys.readouterr().err
    assert command.main(["prune", "--dir", str(folder), "--older-than", "5"]) == 0
    assert oldest.folder.name not in {entry.folder.name for entry in Store(folder).entries()}
    assert "1 results removed" in capsys.readouterr().out and len(Store(folder).entries()) == 2
    assert command.main(["prune", "--dir", str(folder), "--max-gb", "0.003"]) == 0
    assert len(Store(folder).entries()) == 1
    with Store(folder) as user:
        (entry,) = user.entries()
        with user.stage(entry.stage, entry.depends) as slot:
            assert slot.entry is not None
        assert command.main(["prune", "--dir", str(folder), "--all"]) == 0
        assert len(user.entries()) == 1  # in use
    assert command.main(["prune", "--dir", str(folder), "--all"]) == 0
    assert Store(folder).entries() == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (119, "119 s"), (600, "10 min"), (7200, "2 h"), (864000, "10 days")]
)
def test_ages(seconds, text):
    assert command.age(seconds) == text


def test_a_comparison_that_cannot_be_written_says_where_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "file").touch()
    row = RunRow("a", "FINISHED", {"seed": "0"}, {"fold/top1": 0.5})
    monkeypatch.setattr("bnre_exp.jobs.sweep.job_rows", lambda folder: [row])
    assert compare_runs.main(["--sweep", str(tmp_path / "sweep"), "--to", str(tmp_path / "file")]) == 2
    said = f"Error: cannot write to {tmp_path}/file: File exists. Name another folder with --to.\n"
    assert capsys.readouterr().err == said
