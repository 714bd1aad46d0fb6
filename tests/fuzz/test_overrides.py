"""Random overrides: a job with that configuration, or a plain message; never a traceback."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bnre_exp.cli.compose import config_folder
from bnre_exp.cli.main import main
from bnre_exp.cli.mistakes import _fields
from bnre_exp.jobs import run as pipeline
from tests.fuzz.cases import times

FIELDS = sorted(name for name, _ in _fields())
CHOICES = sorted(f"{file.parent.name}={file.stem}" for file in config_folder().glob("*/*.yaml"))
NUMBERS = (
    *("0", "1", "-1", "2", "7", "0.5", "1.5", "-0.0", "1e-9", "1e21", "100000", "99999999999999999999", "0x10"),
    *("nan", ".nan", ".inf", "-inf", "1_000", "08"),
)
WORDS = (
    *(
        "true",
        "false",
        "null",
        "''",
        '""',
        "off",
        "no",
        "auto",
        "???",
        "reuse",
        "sgd",
        "cuda",
        "mse",
        "/nowhere/at/all",
    ),
    *(
        "[]",
        "{}",
        "[1]",
        "[[1]]",
        "[nan]",
        "[1,2,3]",
        "{a: 1}",
        "{a: {b: [1]}}",
        "[null]",
        "[,]",
        "{",
        "]",
        "a b",
        "'",
        '"',
    ),
    *("${seed}", "${nothing}", "${", "${oc.env:NOTHING}", "\\", "é", "名", "\t", "a\nb", "x" * 5000, "=", "a=b", "1,2"),
    *(
        "http://user:secret@host",
        "ftp://x",
        "file:///",
        "torch.nn.Flatten",
        "os.system",
        "bnre_exp.nothing",
        "%s",
        "{0}",
    ),
)
SETTINGS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
PHASES = (Phase.explicit, Phase.generate)

values = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(max_size=8))
names = st.one_of(
    st.sampled_from(FIELDS),
    st.sampled_from(FIELDS).map(lambda name: name[:-1]),
    st.sampled_from([choice.partition("=")[0] for choice in CHOICES]),
    st.builds("{}.{}".format, st.sampled_from(FIELDS), st.sampled_from(["a", "0", "_target_", ""])),
    st.text(max_size=6),
)
prefixes = st.sampled_from([*[""] * 12, "+", "++", "~"])
likely = st.builds(
    "{}={}".format, st.sampled_from(FIELDS), st.sampled_from(["0", "1", "2", "16", "0.5", "true", "null", "text"])
)
overrides = st.one_of(
    st.builds("{}{}={}".format, prefixes, names, values),
    st.sampled_from(CHOICES),
    st.text(max_size=12),
    names,
)
# What would end, or begin something else: a flag is no override, and a folder of Hydra's own is the user's to choose.
allowed = overrides.filter(lambda text: not text.startswith("-") and "hydra" not in text and "\0" not in text)


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, (int, float)):
        yield value


def call(given: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status, and what was said on stderr."""
    sys.argv = ["bnre_exp", *given]
    capsys.readouterr()
    status = main()
    return status, capsys.readouterr().err


def check(given: list[str], status: int, said: str) -> None:
    try:
        assert status in (0, 2)
        assert "Traceback" not in said and "defect of bnre_exp" not in said
        assert status == 0 or len(said.strip()) > 10, "no message"
        assert len(said) < 3000, "too long a message"
    except AssertionError as error:
        raise AssertionError(f"{given}: status {status}, {error}\n{said[-2000:]}") from None


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setenv("BNRE_OUTPUT_DIR", str(tmp_path / "outputs"))
    return tmp_path


@pytest.mark.slow
def test_a_job_begins_or_a_message_says_what_is_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = []

    def begin(config: Any, **_: Any) -> Any:
        begun.append(config)
        return SimpleNamespace(metrics={})

    monkeypatch.setattr(pipeline, "run", begin)

    @settings(max_examples=times(200), phases=PHASES, **SETTINGS)
    @given(st.one_of(st.lists(allowed, min_size=1, max_size=2), st.lists(likely, min_size=1, max_size=1)))
    def holds(given: list[str]) -> None:
        before = len(begun)
        bounded = [*given, f"runtime.output_dir={folder}/outputs"]
        check(given, *call(bounded, capsys))
        for config in begun[before:]:
            kwargs = config.model.kwargs, config.dataset.kwargs, config.task.kwargs  # the user's own affair
            config.model.kwargs = config.dataset.kwargs = config.task.kwargs = {}
            assert all(math.isfinite(number) for number in numbers_in(asdict(config))), (given, kwargs)

    holds()
    assert len(begun) > 20, "hardly any override was taken"


SMALL = (
    *(
        "experiment=smoke",
        "model=mobilenet_v3_small",
        "dataset.train_limit=48",
        "dataset.test_limit=24",
        "tracking=off",
    ),
    *("train.epochs=1", "qat.epochs=1", "reest.num_batches=2", "quant.calib_batches=2", "export=checkpoint"),
)
# Fields whose values may take long or lead elsewhere have their bounds in SMALL, or are left as they are.
LEFT = (
    "hydra",
    "runtime.",
    "store.dir",
    "tracking",
    "model",
    "task",
    "dataset._target_",
    "dataset.root",
    "epochs",
    "batches",
)


@pytest.mark.slow
def test_a_small_job_ends_well_or_says_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changeable = [name for name in FIELDS if "." in name and not any(part in name for part in LEFT)]
    meant = st.sampled_from(["0", "1", "2", "3", "16", "0.5", "true", "false", "null"])
    changes = st.builds("{}={}".format, st.sampled_from(changeable), st.one_of(meant, meant, st.sampled_from(NUMBERS)))
    ended_well = []

    @settings(max_examples=times(25), phases=PHASES, **SETTINGS)
    @given(st.lists(changes, min_size=1, max_size=1))
    def holds(given: list[str]) -> None:
        limits = [f"runtime.output_dir={folder}/outputs", "dataset.train_limit=48", "dataset.test_limit=24"]
        status, said = call([*SMALL, *given, *limits], capsys)
        check(given, status, said)
        ended_well.extend([given] if status == 0 else [])

    holds()
    assert ended_well, "no job ran"  # which values are drawn depends on hypothesis and on this function's text
