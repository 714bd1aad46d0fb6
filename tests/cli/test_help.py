"""The help text names everything that a user can set."""

from __future__ import annotations

import re
import sys
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from bnre_exp.cli.compose import config_folder
from bnre_exp.cli.main import main
from bnre_exp.config import Config, LayerOverride


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bnre_exp", *arguments])
    return main()


def field_names(section: Any, prefix: str) -> list[str]:
    names = []
    for item in fields(section):
        if isinstance(item.default_factory, type) and is_dataclass(item.default_factory):
            names += field_names(item.default_factory, f"{prefix}{item.name}.")
        elif not item.metadata["is_old"]:
            names.append(prefix + item.name)
    return names


def test_help_has_every_field_and_choice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "model=resnet18", "--help") == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 120
    words = text.split()
    names = [*field_names(Config, ""), *field_names(LayerOverride, "quant.overrides[].")]
    assert [name for name in names if name not in words] == []
    for file in config_folder().glob("*/*.yaml"):
        listed = re.search(rf"^  {file.parent.name}  .*\n(?:   .*\n)*", text, re.M)
        assert listed is not None and file.stem in re.split(r"[\s,*]+", listed[0])
    assert "fp32.min_top1" not in words  # an old name, which is accepted and not shown
    assert "(>= 2, <= 16)" in " ".join(words)
    default = next(line.split()[2] for line in text.splitlines() if line.split()[:1] == ["quant.weight_bits"])
    assert default == "2"  # that of the default choice quant=w2a8, not of the dataclass


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("bnre_exp ")
