"""The recipes of others: each says what it should, and runs on its own network and few images of digits."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from bnre_exp.cli.compose import compose_config, config_folder
from bnre_exp.config import Config, Oscillation, QatPrepare, QatValidate, ReestMethod
from bnre_exp.jobs.run import run

ROOT, CONF = Path(__file__).parents[2], config_folder()
RECIPES = sorted(path.stem for path in (CONF / "experiment" / "recipe").glob("*.yaml"))
STAND_IN = [
    "dataset=digits", "model.weights=null", "train=default", "train.epochs=8", "dataset.train_limit=96",
    "dataset.test_limit=32", "dataset.batch_size=16", "quant.calib_batches=1", "tracking=off", "store=off",
    "export=checkpoint",
]  # fmt: skip


def recipe(name: str, *overrides: str) -> Config:
    return compose_config([f"experiment=recipe/{name}", *overrides])


def test_there_are_recipes_and_each_is_on_the_page() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert len(RECIPES) == 6 and all(f"`{name}`" in page for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_for_a_pretrained_network_on_imagenet(name: str) -> None:
    config = recipe(name)
    assert config.model.weights in ("DEFAULT", "true") and config.dataset._target_ == "bnre_exp.data.imagenet"
    assert config.train.epochs is None and config.dataset.train_epochs == 0  # nothing is trained before


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("oscillations")])
def test_the_paper_judges_by_reestimated_statistics_and_stops_oscillations_by_either_method(name: str) -> None:
    config = recipe(name)
    bits = int(name[-1])
    assert (config.quant.weight_bits, config.quant.act_bits, config.quant.first_last_bits) == (bits, bits, 8)
    assert config.qat.oscillation is Oscillation.freezing and config.qat.freeze_from == 0.1
    assert config.qat.validate is QatValidate.reestimated and config.qat.validate_batches == 50
    config = recipe(name, "qat.oscillation=dampening", "quant.act_bits=null")  # weights alone
    assert config.qat.oscillation is Oscillation.dampening and config.quant.act_bits is None


def test_those_of_the_toolkits_do_what_the_toolkits_do() -> None:
    aimet, nncf = recipe("aimet_mobilenet_v2"), recipe("nncf_bn_adaptation")
    assert aimet.qat.prepare is QatPrepare.calibrate and aimet.qat.epochs == 20 and aimet.quant.per_channel
    assert nncf.qat.epochs == 0 and nncf.reest.method is ReestMethod.ema and nncf.reest.num_samples == 2000


@pytest.mark.slow
@pytest.mark.usefixtures("verified_here")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_from_end_to_end(name: str, tmp_path) -> None:
    has_qat = recipe(name).qat.epochs > 0
    few = ["qat.epochs=1", "qat.validate_batches=1", "reest.num_batches=2"] if has_qat else []
    config = recipe(name, *STAND_IN, *few, f"runtime.output_dir={tmp_path}")
    results = run(config, run_dir=tmp_path / "run", console=Console(file=io.StringIO()))
    assert {"ptq", "reest", "fold"} <= results.evaluations.keys() and ("qat" in results.evaluations) == has_qat
    assert results.metrics["fold/folded_bns"] > 40 or config.model.name == "resnet18"
    assert results.metrics["fold/kept_bns"] == 0 and (tmp_path / "run" / "folded").is_dir()
