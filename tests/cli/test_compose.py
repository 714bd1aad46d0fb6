"""Every config group and experiment composes into a typed configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from bnre_exp.cli.compose import compose_config, config_folder
from bnre_exp.config import FoldMode, LayerOverride, Optimizer

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
