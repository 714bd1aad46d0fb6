"""The command line: configuration groups, help, and what is said, with which exit status, when something is wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import bnre_exp
from bnre_exp import pipeline
from bnre_exp.__main__ import compose_config, config_folder, main
from bnre_exp.config import Config, FoldMode, LayerOverride, Optimizer
from bnre_exp.errors import Terminated, UserError

GROUP_FILES = sorted(file for file in config_folder().glob("*/*.yaml"))
ROOT = Path(bnre_exp.__file__).parent.parent


class Job:
    """Stands where a job would start to work; remembers the configurations that got as far."""

    def __init__(self) -> None:
        self.configs: list[Config] = []
        self.folders: list[Path] = []
        self.action: Callable[[Config], None] = lambda config: None

    def __call__(self, config: Config, *, run_dir: Path, overrides: Any, console: Any) -> None:
        self.configs.append(config)
        self.folders.append(run_dir)
        self.action(config)


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


# --- configuration groups


@pytest.mark.parametrize("file", GROUP_FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_choice_composes_to_what_its_file_says(file: Path) -> None:
    group = file.parent.name
    overrides = [f"{group}={file.stem}", *(["model._target_=torch.nn.Flatten"] if file.stem == "custom" else [])]
    config = compose_config(overrides)
    said = OmegaConf.to_container(OmegaConf.load(file))
    sections = said.items() if group == "experiment" else [(group, said)]
    for name, values in sections:
        for key, value in values.items():
            got = getattr(getattr(config, name), key)
            if value != "":
                assert (got.name if hasattr(got, "name") else got) == value, f"{name}.{key}"


def test_defaults_are_the_main_job() -> None:
    config = compose_config([])
    assert (config.model.name, config.dataset._target_) == ("resnet18", "bnre_exp.data.digits")
    assert (config.quant.weight_bits, config.quant.act_bits, config.reest.num_batches) == (4, 8, 100)
    assert config.qat.epochs > 0 and config.fold.mode is FoldMode.scale and config.tracking.enabled


def test_quant_choices_do_what_their_names_say() -> None:
    for file in (config_folder() / "quant").glob("*.yaml"):
        quant = compose_config([f"quant={file.stem}"]).quant
        name = f"w{quant.weight_bits}" + ("" if quant.act_bits is None else f"a{quant.act_bits}")
        assert name + ("" if quant.per_channel else "_per_tensor") == file.stem


def test_values_are_typed() -> None:
    config = compose_config(
        ["train.optimizer=adamw", "model.kwargs.width=2", "quant.overrides=[{pattern: 'a.*', act_bits: 16}]"]
    )
    assert config.train.optimizer is Optimizer.adamw
    assert config.model.kwargs == {"width": 2}
    assert config.quant.overrides == [LayerOverride("a.*", act_bits=16)]


def test_a_choice_on_the_command_line_beats_the_experiment() -> None:
    config = compose_config(["experiment=smoke", "qat=off", "dataset.train_limit=99"])
    assert config.qat.epochs == 0 and config.dataset.train_limit == 99 and config.dataset.test_limit == 128


def test_output_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNRE_OUTPUT_DIR", raising=False)
    assert compose_config([]).runtime.output_dir == str(tmp_path / "outputs")
    monkeypatch.setenv("BNRE_OUTPUT_DIR", str(tmp_path / "elsewhere"))
    assert compose_config([]).runtime.output_dir == str(tmp_path / "elsewhere")
    assert compose_config(["runtime.output_dir=here"]).runtime.output_dir == str(tmp_path / "here")


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
    ("quant=3", ["string"]),
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
    job.action = lambda config: ((job.folders[0] / "metrics.jsonl").write_text("{}\n"), action(config))[1]
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


# --- multirun


def test_multirun_goes_on_after_a_failed_job(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "-m", "quant.weight_bits=1,2,3", "seed=5") == 2
    assert [config.quant.weight_bits for config in job.configs] == [2, 3]
    assert {folder.parent.parent for folder in job.folders} == {tmp_path / "outputs" / "multirun"}
    assert [folder.name for folder in job.folders] == ["1", "2"]
    said = capsys.readouterr()
    assert "job 2: quant.weight_bits=3 seed=5" in said.out
    listed = said.err[said.err.index("1 job(s) of this multirun failed") :]
    assert "0: quant.weight_bits=1 seed=5" in listed and "at least 2" in listed
    assert "Traceback" not in said.err


def test_multirun_with_a_defect_has_exit_status_1(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.action = lambda config: raising(RuntimeError("defect"))(config) if config.seed == 1 else None
    assert call(monkeypatch, "-m", "seed=-1,1,2") == 1
    assert [config.seed for config in job.configs] == [1, 2]
    job.action = lambda config: None
    assert call(monkeypatch, "-m", "seed=1,2") == 0  # nothing is left over from the failed one


def test_ctrl_c_stops_a_multirun(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.action = raising(KeyboardInterrupt())
    assert call(monkeypatch, "-m", "seed=1,2,3") == 130
    assert len(job.configs) == 1


def test_a_mistyped_key_stops_a_multirun_before_its_first_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "-m", "reest.num_batches=0,abc") == 2
    assert job.configs == []


# --- help


def field_names(section: Any, prefix: str) -> list[str]:
    names = []
    for item in fields(section):
        if isinstance(item.default_factory, type) and is_dataclass(item.default_factory):
            names += field_names(item.default_factory, f"{prefix}{item.name}.")
        else:
            names.append(prefix + item.name)
    return names


def test_help_has_every_field_and_choice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "model=resnet18", "--help") == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 120
    words = text.split()
    names = [*field_names(Config, ""), *field_names(LayerOverride, "quant.overrides[].")]
    assert [name for name in names if name not in words] == []
    for file in GROUP_FILES:
        line = next(line for line in text.splitlines() if line.split()[:1] == [file.parent.name])
        assert file.stem in line.replace(",", " ").replace("*", " ").split()
    assert "(>= 2, <= 16)" in " ".join(words)
    default = next(line.split()[2] for line in text.splitlines() if line.split()[:1] == ["quant.weight_bits"])
    assert default == "4"  # that of the default choice quant=w4a8, not of the dataclass


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("bnre_exp ")


def test_hydras_own_flags_still_work(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--cfg", "job", "seed=3") == 0
    assert "seed: 3" in capsys.readouterr().out
    assert call(monkeypatch, "--no-such-flag") == 2
    assert job.configs == []


# --- real processes, from another folder


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("BNRE_OUTPUT_DIR", None)
    command = [sys.executable, "-m", "bnre_exp", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_process_with_a_mistake(tmp_path: Path) -> None:
    process = start(tmp_path, "quant.weight_bit=3")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.startswith("Error: quant.weight_bit:") and len(error.splitlines()) == 1


def test_process_stopped_by_sigterm_keeps_what_is_finished(tmp_path: Path) -> None:
    process = start(tmp_path, "experiment=smoke", "tracking=off", "dataset.train_epochs=1000")
    deadline = time.monotonic() + 120
    try:
        while not list(tmp_path.glob("outputs/runs/*/metrics.jsonl")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, error
    assert "SIGTERM" in error and "Traceback" not in error
    (run,) = tmp_path.glob("outputs/runs/*")
    assert f"What was finished is in {run}" in error
    assert (run / "config.yaml").exists() and (run / "bnre_exp.log").exists()
