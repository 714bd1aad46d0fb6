"""The command line: where a job runs, and what is said, with which exit status, when something is wrong."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from bnre_exp.cli.compose import plain_config
from bnre_exp.cli.main import main
from bnre_exp.config import Config
from bnre_exp.errors import Terminated, UserError
from bnre_exp.jobs import run as pipeline


class Job:
    """Stands where a job would start to work; remembers the configurations that got as far."""

    def __init__(self) -> None:
        self.configs: list[Config] = []
        self.folders: list[Path] = []
        self.action: Callable[[Config], None] = lambda config: None

    def __call__(self, config: Config, *, run_dir: Path, **more: Any) -> Any:
        self.configs.append(config)
        self.folders.append(run_dir)
        self.action(config)
        return SimpleNamespace(metrics={})


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    stand_in = Job()
    monkeypatch.setattr(pipeline, "run", stand_in)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNRE_OUTPUT_DIR", raising=False)
    return stand_in


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bnre_exp", *arguments])
    return main()


# --- a job


def test_a_job_gets_its_own_folder_with_its_configuration(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert call(monkeypatch, "quant=w3", "seed=7") == 0
    assert call(monkeypatch, "quant=w3", "seed=8") == 0
    first, second = job.folders
    assert first != second and first.parent == second.parent == tmp_path / "outputs" / "runs"
    saved = OmegaConf.load(first / "config.yaml")
    assert (saved.quant.weight_bits, saved.quant.act_bits, saved.seed) == (3, None, 7)
    assert saved.runtime.output_dir == str(tmp_path / "outputs")
    assert (first / "bnre_exp.log").exists()
    assert not (tmp_path / "outputs" / "multirun").exists()


BAD = [
    ("~quant", ["~quant", "cannot be removed"]),
    ("modle=resnet18", ["modle", "Did you mean model"]),
    ("model=resnet19", ["model=resnet19", "resnet18", "mobilenet_v2", "timm"]),
    ("experiment=smok", ["experiment=smoke"]),
    ("quant.weight_bit=3", ["quant.weight_bit:", "quant.weight_bits"]),
    ("quant.weight_bits=abc", ["quant.weight_bits=abc", "Integer"]),
    ("quant.weight_bits=1", ["quant.weight_bits=1", "at least 2"]),
    ("quant.weight_bits=17", ["quant.weight_bits=17", "at most 16"]),
    ("reest.num_batches=-1", ["reest.num_batches=-1", "at least 0"]),
    ("reest.num_batches=1.5", ["reest.num_batches=1.5", "Integer"]),
    ("qat.lr=nan", ["qat.lr=nan", "greater than 0"]),
    ("train.optimizer=foo", ["train.optimizer=foo", "sgd, adamw"]),
    ("+unknown=1", ["unknown: there is no such"]),
    ("+quant.foo=1", ["quant.foo: there is no such"]),
    ("+foo=bar", ["foo: there is no such"]),
    ("+foo/x=bar", ["foo/x"]),
    ("model={a: 1}", ["model.a: there is no such"]),
    ("quant.overrides=[{pattern: a, weight_bit: 4}]", ["quant.overrides.weight_bit", "quant.overrides.weight_bits"]),
    ("quant.overrides=[{pattern: a, weight_bits: 99}]", ["weight_bits=99", "at most 16"]),
    ("quant.weight_bits=${nope}", ["quant.weight_bits", "'nope' not found"]),
    ("runtime.output_dir=${nope}", ["'nope' not found"]),
    ("runtime.output_dir=", ["runtime.output_dir is empty"]),
    ("runtime.output_dir=file/below", ["cannot write to", "BNRE_OUTPUT_DIR"]),
    ("model._target_=???", ["model._target_ has no value"]),
    ("model=custom", ["model._target_ is empty"]),
    ("resnet18", ["'resnet18' is not understood", "GROUP=CHOICE"]),
    ("sync", ["the command is bnre-exp-sync"]),
    ("quant=3", ["string"]),
    ("dataset.default_std.a=-1", ["invalid literal for int", "'a'"]),
    ("model=[1,2,3]", ["GROUP=CHOICE", "dataset.mean=[0.5]"]),
    ("quant=w4a8,w3a8", ["add -m"]),
    ("+quant.weight_bits=3", ["without the +"]),
    ("~model.kwargs", ["cannot be removed"]),
    ("hydra.foo=1", ["hydra.foo"]),
]


@pytest.mark.parametrize(("override", "words"), BAD, ids=[override for override, _ in BAD])
def test_a_users_mistake_gives_one_message(
    override: str,
    words: list[str],
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert call(monkeypatch, override) == 2
    said = capsys.readouterr()
    assert job.configs == [] and said.out == ""
    assert len(said.err.splitlines()) == 1 and said.err.startswith("Error: ")
    for word in words:
        assert word in said.err


def raising(error: BaseException) -> Callable[[Config], None]:
    def action(config: Config) -> None:
        raise error

    return action


def failing_with_cause(config: Config) -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/folder/weights.bin")
    except OSError as error:
        raise RuntimeError("could not write the file") from error


ENDINGS = [
    (raising(UserError("the data are not there")), 2, "Error: the data are not there"),
    (raising(KeyboardInterrupt()), 130, "Interrupted"),
    (raising(Terminated()), 143, "SIGTERM"),
    (lambda config: os.kill(os.getpid(), signal.SIGTERM), 143, "SIGTERM"),
    (failing_with_cause, 1, f"the disk is full, in {os.path.join('some', 'folder')}"),
    (raising(RuntimeError("I/O error: No space left on device (os error 28)")), 1, "the disk is full"),
]


@pytest.mark.parametrize(("action", "status", "words"), ENDINGS)
def test_how_a_job_ends(
    action: Callable[[Config], None],
    status: int,
    words: str,
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    job.action = lambda config: ((job.folders[0] / "metrics.jsonl").write_text('{"metrics": {}}\n'), action(config))[1]
    assert call(monkeypatch) == status
    said = capsys.readouterr().err
    assert words.split(", in ")[0] in said and words.rpartition(", in ")[2] in said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == f"What was finished is in {job.folders[0]}"
    assert "The job stopped." in (job.folders[0] / "bnre_exp.log").read_text()
    assert signal.getsignal(signal.SIGTERM) is before


def test_our_own_defect_shows_everything(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.action = raising(ValueError("not a user's mistake"))
    assert call(monkeypatch) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "in action" in said and "not a user's mistake" in said
    assert str(job.folders[0] / "bnre_exp.log") in said
    assert "Traceback" in (job.folders[0] / "bnre_exp.log").read_text()


ADVICE = [
    (["seed=1"], "Repeat the command to go on where it stopped."),
    (["-m", "seed=1,2,3", "tracking=off"], "Repeat the command to go on where it stopped."),
    (["seed=1", "store=off"], "With store=off, repeating the command starts from the beginning."),
    (["seed=1", "store=refresh"], ""),
]
MORE_ADVICE = [
    (["seed=1", "hydra.run.dir=here"], "Repeat the command to go on where it stopped."),
    (["-m", "seed=1,2", "store=off", "tracking=off"], "Repeat the command to go on where it stopped."),
    (["-m", "seed=choice(1,2)", "hydra/sweeper=optuna", "tracking=off"], "Repeating the command starts a new search."),
]
STOPS = [(KeyboardInterrupt, *case) for case in ADVICE] + [(Terminated, *case) for case in ADVICE[:2]]
MORE_STOPS = [(KeyboardInterrupt, *case) for case in MORE_ADVICE]
MORE_STOPS += [(Terminated, *case) for case in [*ADVICE[2:], *MORE_ADVICE]]
MORE_STOPS = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_STOPS]


@pytest.mark.parametrize(("stop", "arguments", "advice"), [*STOPS, *MORE_STOPS])
def test_who_stops_it_is_told_whether_it_goes_on(
    stop: type[BaseException],
    arguments: list[str],
    advice: str,
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "hydra/sweeper=optuna" in arguments:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    job.action = raising(stop())
    assert call(monkeypatch, *arguments) == (143 if stop is Terminated else 130)
    how = "Stopped by SIGTERM." if stop is Terminated else "Interrupted (Ctrl-C)."
    said = capsys.readouterr().err
    assert f"{how} {advice}".rstrip() + "\n" in said and said.count(how) == 1
    assert len(job.configs) == 1


# --- multirun


def test_multirun_goes_on_after_a_failed_job(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = "tracking.run_name='[/x] [bold]'"  # no markup
    assert call(monkeypatch, "-m", "quant.weight_bits=1,2,3", "seed=5", name) == 2
    assert [config.quant.weight_bits for config in job.configs] == [2, 3]
    assert {folder.parent.parent for folder in job.folders} == {tmp_path / "outputs" / "multirun"}
    assert [folder.name for folder in job.folders] == ["1", "2"]
    said = capsys.readouterr()
    assert "job 2: quant.weight_bits=3 seed=5" in said.out and "[/x] [bold]" in said.out
    listed = said.err[said.err.index("1 job(s) of this multirun failed") :]
    assert "0: quant.weight_bits=1 seed=5" in listed and "at least 2" in listed
    assert "Traceback" not in said.err


@pytest.mark.slow
def test_multirun_with_a_defect_has_exit_status_1(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.action = lambda config: raising(RuntimeError("defect"))(config) if config.seed == 1 else None
    assert call(monkeypatch, "-m", "seed=-1,1,2", "tracking=off") == 1
    assert [config.seed for config in job.configs] == [1, 2]
    job.action = lambda config: None
    assert call(monkeypatch, "-m", "seed=1,2", "tracking=off") == 0  # nothing is left over from the failed one


def test_a_mistyped_key_stops_a_multirun_before_its_first_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "-m", "reest.num_batches=0,abc", "tracking=off") == 2
    assert job.configs == []


def test_what_is_looked_for_is_what_a_job_leaves(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity by which an interrupted job is found is the one that the job itself writes."""
    job.action = raising(KeyboardInterrupt())
    for _ in range(2):
        assert call(monkeypatch, "quant=w3", "seed=7") == 130
    assert call(monkeypatch, "quant=w3", "seed=8") == 130
    assert [folder == job.folders[0] for folder in job.folders] == [True, True, False]


@pytest.mark.slow
def test_what_is_looked_for_is_what_a_multirun_leaves(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.action = raising(KeyboardInterrupt())
    for _ in range(2):
        assert call(monkeypatch, "-m", "quant=w3,w4", "tracking=off") == 130
    assert job.folders[0] == job.folders[1] and job.folders[0].parent.parent.name == "multirun"
    job.action = lambda config: None
    assert call(monkeypatch, "-m", "quant=w3,w4", "tracking=off") == 0
    assert [folder.name for folder in job.folders[2:]] == ["0", "1"] and job.folders[2] == job.folders[0]
    assert call(monkeypatch, "-m", "quant=w3,w4", "tracking=off") == 0  # finished: this is a new one
    assert job.folders[4].parent != job.folders[2].parent


@pytest.mark.slow
def test_a_failed_job_does_not_stop_the_batches_that_follow(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.action = lambda config: raising(UserError("no"))(config) if config.seed == 1 else None
    assert call(monkeypatch, "-m", "seed=1,2,3", "hydra.sweeper.max_batch_size=1", "tracking=off") == 2
    assert [config.seed for config in job.configs] == [1, 2, 3]


def test_a_folder_that_the_user_names_is_used_and_what_was_in_it_is_kept(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "a[/b] = 'c', d"
    quoted = str(place).replace("'", "\\'")
    for seed in (1, 2):
        text = f'{{"seed": {seed}}}\n'
        job.action = lambda config, text=text: (job.folders[-1] / "metrics.jsonl").write_text(text) and None
        assert call(monkeypatch, f"hydra.run.dir='{quoted}'", f"seed={seed}") == 0, capsys.readouterr().err
    assert job.folders == [place, place] and (place / "metrics.jsonl").read_text() == '{"seed": 2}\n'
    assert (place / "earlier-1" / "metrics.jsonl").read_text() == '{"seed": 1}\n'


SWEEP = """# @package _global_
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      quant.weight_bits: 3
      quant.per_channel: true,false
"""


def test_a_job_of_a_sweep_is_told_by_what_it_differs(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[str] = []
    monkeypatch.setattr(pipeline, "run", lambda *a, differing, **k: given.append(differing))
    assert call(monkeypatch, "-m", "quant=w3,w4", "seed=7", "+model.kwargs.a=1,2", "store=off", "tracking=off") == 0
    assert given == ["quant=w3 a=1", "quant=w3 a=2", "quant=w4 a=1", "quant=w4 a=2"]
    given.clear()
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text(SWEEP)
    assert call(monkeypatch, "--config-dir=conf", "experiment=own", "tracking=off") == 0
    assert given == ["weight_bits=3 per_channel=True", "weight_bits=3 per_channel=False"]
    given.clear()
    assert call(monkeypatch, "seed=7") == 0 and given == [""]


def test_a_job_is_told_what_a_plain_command_would_be(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []

    def note(config: Config, *, default: Config, **more: Any) -> Any:
        given.append((config.quant.weight_bits or 0, default.quant.weight_bits or 0))
        assert (default.model.name, default.dataset.batch_size, default.seed) == ("resnet18", 64, 0)
        return SimpleNamespace(metrics={})

    monkeypatch.setattr(pipeline, "run", note)
    plain_config.cache_clear()
    assert call(monkeypatch, "quant=w3", "model=mobilenet_v2", "seed=7", "store=off", "tracking=off") == 0
    assert call(monkeypatch, "-m", "quant.weight_bits=2,4", "experiment=smoke", "store=off", "tracking=off") == 0
    assert given == [(3, 2), (2, 2), (4, 2)]


# --- Hydra's own flags


def test_hydras_own_flags_still_work(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--cfg", "job", "seed=3") == 0
    assert "seed: 3" in capsys.readouterr().out
    assert call(monkeypatch, "--no-such-flag") == 2
    assert job.configs == []
