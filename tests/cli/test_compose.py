"""Every config group and experiment composes into a typed configuration."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf

from bnre_exp.cli.compose import compose_config, config_folder
from bnre_exp.config import Config, FoldMode, LayerOverride, Optimizer
from bnre_exp.errors import UserError

GROUP_FILES = sorted(config_folder().glob("*/*.yaml"))


def plain(value: Any) -> Any:
    """A value with the names of enum members for the members."""
    return [plain(item) for item in value] if isinstance(value, list) else getattr(value, "name", value)


@pytest.mark.parametrize("file", GROUP_FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_choice_composes_to_what_its_file_says(file: Path) -> None:
    group = file.parent.name
    needed = {"custom": ["model._target_=torch.nn.Flatten"], "onnx": ["model.path=net.onnx"]}
    overrides = [f"{group}={file.stem}", *needed.get(file.stem, [])]
    config = compose_config(overrides)
    around = OmegaConf.create({"dataset": {"num_classes": config.dataset.num_classes}, "own": OmegaConf.load(file)})
    said = OmegaConf.to_container(around.own, resolve=True)
    for choice in said.pop("defaults", []):  # of an experiment
        ((name, option),) = choice.items()
        chosen = compose_config([f"{name.removeprefix('override /')}={option}"])
        assert getattr(chosen, name.removeprefix("override /")) == getattr(config, name.removeprefix("override /"))
    said.pop("hydra", None)
    sections = said.items() if group == "experiment" else [(group, said)]
    for name, values in sections:
        for key, value in values.items():
            got = getattr(getattr(config, name), key)
            if value not in ("", "???"):
                assert plain(got) == value, f"{name}.{key}"
    if group == "quant":  # what its name says
        bits = f"w{config.quant.weight_bits}" + ("" if config.quant.act_bits is None else f"a{config.quant.act_bits}")
        assert bits + ("" if config.quant.per_channel else "_per_tensor") == file.stem


def test_defaults_are_the_main_job() -> None:
    config = compose_config([])
    assert (config.model.name, config.dataset._target_) == ("resnet18", "bnre_exp.data.digits")
    assert (config.quant.weight_bits, config.quant.act_bits, config.reest.num_batches) == (2, 8, 100)
    assert config.qat.epochs > 0 and config.fold.mode is FoldMode.scale and config.tracking.enabled


def test_values_are_typed() -> None:
    config = compose_config(
        ["train.optimizer=adamw", "model.kwargs.width=2", "quant.overrides=[{pattern: 'a.*', act_bits: 16}]"]
    )
    assert config.train.optimizer is Optimizer.adamw
    assert config.model.kwargs == {"width": 2}
    assert config.quant.overrides == [LayerOverride("a.*", act_bits=16)]


NONSENSE = [
    ("quant.per_channel=2", "true or false"),
    ("quant.overrides=[{pattern: a, off: 2}]", "true or false"),
    ("train.epochs=1000000000000000000000", "at most"),
    ("qat.epochs=1000000000000", "at most"),
    ("reest.num_batches=10000000000000", "at most"),
    ("quant.calib_batches=10000000000000", "at most"),
    ("train.lr=1e300", "at most"),
    ("qat.weight_decay=1e300", "at most"),
    ("runtime.threads=100000", "at most 4096"),
    ("runtime.workers=100000", "at most"),
    ("dataset.batch_size=100000000000", "at most"),
    ("dataset.image_size=10000000", "at most"),
    ("dataset.num_classes=10000000000", "at most"),
    ("store.max_gb=1e300", "at most"),
    ("store.max_gb=nan", "at most"),
    ("dataset.mean=[nan]", "finite"),
    ("dataset.mean=[[1]]", "a list, each a number"),
    ("dataset.mean=[]", "empty"),
    ("dataset.default_mean=[inf]", "finite"),
    ("dataset.default_std=[[1]]", "a list, each a number"),
    ("export.formats=[[1]]", "each one of checkpoint, onnx, encodings"),
    ("export.formats=[{a: 1}]", "each one of checkpoint, onnx, encodings"),
    ("export.formats=[onnx,onnx]", "twice"),
    ("model.strip_prefixes=[[1]]", "each text"),
    ("model.leaf_modules=[{a: 1}]", "each text"),
    ("fp32.min_headline=nan", "finite"),
    ("fp32.min_headline=-inf", "finite"),
    ("model._target_=3", "no dotted path"),
    ("dataset._target_='a b'", "no dotted path"),
    ("task._target_=''", "is empty"),
    ("tracking.uri=ftp://x", "no such store"),
    ("tracking.uri=htp://x", "no such store"),
    ("tracking.uri=http://", "no host"),
    ("tracking.uri=''", "no such store"),
]


@pytest.mark.parametrize(("override", "words"), NONSENSE, ids=[override for override, _ in NONSENSE])
def test_nonsense_is_refused_by_its_name(override: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        compose_config([override])
    name = override.partition("=")[0]
    assert str(raised.value).startswith((name, "quant.overrides.off")) and words in str(raised.value)


@pytest.mark.parametrize(
    "uri",
    ["http://host:5000", "https://h/x", "sqlite:///a.db", "postgresql+psycopg2://u@h/db", "databricks", "file:///a"],
)  # fmt: skip
def test_what_mlflow_takes_is_taken(uri: str) -> None:
    assert compose_config([f"tracking.uri={uri}"]).tracking.uri == uri


def test_a_password_is_not_told() -> None:
    with pytest.raises(UserError) as raised:
        compose_config(["tracking.uri='htp://alice:SECRET@host'"])
    assert "SECRET" not in str(raised.value)


def test_switches_take_words_and_0_and_1() -> None:
    for text, value in (("true", True), ("yes", True), ("1", True), ("False", False), ("no", False), ("0", False)):
        assert compose_config([f"quant.per_channel={text}"]).quant.per_channel is value


def test_no_number_is_without_an_end() -> None:
    free = {"min_headline", "train_limit", "test_limit"}
    sections = [item.default_factory for item in fields(Config)]
    for section in [Config, LayerOverride, *(kind for kind in sections if isinstance(kind, type))]:
        for item in fields(section):
            if get_type_hints(section)[item.name] in (int, float, int | None, float | None) and item.name not in free:
                bounds = item.metadata["bounds"]
                assert bounds["at most"] is not None or bounds["less than"] is not None, item.name


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
