"""What the shell offers while a command is typed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bnre_exp.cli.main import main

OFFERED = [
    ("train.optimizer=", "train.optimizer=sgd train.optimizer=adamw"),
    ("train.optimizer=a", "train.optimizer=adamw"),
    ("-m train.optimizer=sgd,a", "train.optimizer=sgd,adamw"),
    ("quant.per_channel=", "quant.per_channel=true quant.per_channel=false"),
    ("export.formats=[c", "export.formats=[checkpoint] export.formats=[checkpoint,onnx,encodings]"),
    ("dataset.mean=", ""),  # not dataset.mean=0=
    ("train.opt", "train.optimizer="),
    ("model=mobilenet_v", "model=mobilenet_v2 model=mobilenet_v3_small"),
    ("--config-dir conf experiment=m", "experiment=mine"),
]


def complete(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COMP_LINE", f"bnre-exp {line}")
    monkeypatch.setattr(sys, "argv", ["bnre-exp", "-sc", "query=bash"])
    return main()


@pytest.mark.parametrize(("line", "offered"), OFFERED)
def test_what_is_offered(
    line: str, offered: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").touch()
    assert complete(line, monkeypatch) == 0
    assert capsys.readouterr().out.strip() == offered


def test_a_mistake_is_not_told_in_the_middle_of_typing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in ("modle=x train.l", "--config-dir nowhere experiment=", "'quant.overrides=[{ train."):
        complete(line, monkeypatch)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("program", ["bnre-exp", "/checkout/bnre_exp/__main__.py"])
def test_it_is_installed_for_the_command(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "-sc", "install=bash"])
    assert main() == 0
    assert capsys.readouterr().out.strip().endswith("-F hydra_bash_completion bnre-exp")
