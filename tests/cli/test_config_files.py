"""Config files of the user's own: found, listed, and what is wrong in them told by file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bnre_exp.cli.main import main
from bnre_exp.jobs import run as pipeline

GLOBAL = "# @package _global_\n"
MISTAKES = {
    "a word that YAML reads as false": (GLOBAL + "defaults:\n  - override /qat: off\n", ['override /qat: "off"']),
    "one that is no override": (GLOBAL + "defaults:\n  - /qat: off\n", ['/qat: "off"']),
    "a number": (GLOBAL + "defaults:\n  - override /quant: 3\n", ['override /quant: "3"']),
    "one in a list": (GLOBAL + "defaults:\n  - override /qat: [off]\n", ["in quotes"]),
    "no colon": (GLOBAL + "defaults:\n  - override /qat off\n", ["lacks the colon"]),
    "no list": (GLOBAL + 'defaults:\n  override /qat: "off"\n', ["must be a list"]),
    "a list": (GLOBAL + "- a\n", ["mine.yaml", "must name groups and fields"]),
    "no YAML": (GLOBAL + "seed: [1\n", ["line 3", "not YAML"]),
    "no text": (b"\xff\xfe", ["UTF-8"]),
    "no package": ("qat:\n  epochs: 3\n", ["# @package _global_"]),
    "no choice": (GLOBAL + "defaults:\n  - override /qat: null\n", ["qat=null", "a choice"]),
    "a word of a field": (GLOBAL + "store:\n  mode: off\n", ["store.mode", 'write "off"']),
}


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*given: object, **more: object) -> None:
        raise RuntimeError("a job started")

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.chdir(tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bnre_exp", *arguments])
    return main()


@pytest.mark.parametrize(("content", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_file_gives_one_message_that_says_what_to_write(
    content: str | bytes,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    file = tmp_path / "conf" / "experiment" / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert call(monkeypatch, "--config-dir", "conf", "experiment=mine") == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("Error: ") and len(said.err.splitlines()) == 1
    assert all(word in said.err for word in words), said.err
    assert not (tmp_path / "outputs" / "runs").exists()


def test_the_file_that_was_chosen_is_named_and_not_another_with_a_mistake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "a_draft.yaml").write_text("seed: [1\n")
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(GLOBAL + "defaults:\n  - override /qat: off\n")
    assert call(monkeypatch, "--config-dir", "conf", "experiment=mine") == 2
    assert "mine.yaml: override /qat: off" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_no_empty_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--config-dir=nowhere") == 2
    assert capsys.readouterr().err == "Error: --config-dir nowhere: there is no such folder.\n"


def test_help_lists_choices_of_the_users_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("experiment/mine", "experiment/paper/first", "model/resnet18", "own_group/one"):
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for flag in (["--config-dir", "conf"], ["--config-dir=conf"], ["-cd", "conf"]):
        assert call(monkeypatch, "--help", *flag) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "smoke, mine+, paper/first+" in text and "own_group one+" in text and "resnet18*, resnet50" in text
    assert call(monkeypatch, "--help") == 0
    assert "mine+" not in capsys.readouterr().out
