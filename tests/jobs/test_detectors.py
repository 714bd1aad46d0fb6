"""Detectors go through the whole runner: one of Ultralytics as a whole, one of torchvision in its parts."""

from __future__ import annotations

import io
import json

import onnxruntime
import pytest
import torch
from rich.console import Console
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from bnre_exp import UserError, load_folded
from bnre_exp.cli.compose import compose_config
from bnre_exp.jobs.run import run

SMALL = [
    "dataset=digit_scenes", "dataset.kwargs={size: 64, most: 2, count: 48}", "dataset.batch_size=8",
    "dataset.eval_batch_size=16", "dataset.val_fraction=0.2", "quant=w4a8", "quant.calib_batches=2", "train=adamw",
    "train.lr=2e-3", "train.epochs=1", "reest.num_batches=2", "tracking.enabled=false", "export=all",
    "export.min_agreement=0",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("verified_here")


class Backbone(nn.Sequential):
    """One feature map, a fourth as large as the image."""

    out_channels = 32

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers)


def small_fcos(num_classes: int = 10) -> FCOS:
    """torchvision's FCOS with a small backbone, for images of 64 pixels."""
    anchors = AnchorGenerator(sizes=((16,),), aspect_ratios=((1.0,),))
    return FCOS(Backbone(), num_classes, min_size=64, max_size=64, anchor_generator=anchors, score_thresh=0.01)


DETECTORS = {
    "ultralytics": ["model=ultralytics", "model.name=yolov8n", "task=ultralytics"],
    "torchvision": [
        "model=custom", "model._target_=tests.jobs.test_detectors.small_fcos", "model.submodules=[backbone, head]",
        "task=detection",
    ],
}  # fmt: skip


def job(folder, *overrides: str, name: str = "run"):
    config = compose_config([*SMALL, f"runtime.output_dir={folder}", *overrides])
    console = Console(record=True, width=160, file=io.StringIO())
    return run(config, run_dir=folder / name, overrides=overrides, console=console), console.export_text()


@pytest.mark.slow
@pytest.mark.parametrize("which", DETECTORS)
def test_a_detector_goes_through_every_stage(tmp_path, which):
    """QAT too; and every stage is found again, those of parts as well."""
    how = [*DETECTORS[which], "qat.epochs=1", "qat.lr=1e-3"]
    results, said = job(tmp_path, *how)
    metrics = results.metrics
    stages = ("fp32", "ptq", "qat", "reest", "fold", "export", "encodings", "onnx")
    assert all(f"{stage}/{name}" in metrics for stage in stages for name in ("map", "map_50"))
    assert "mAP" in said and metrics["export/map"] == metrics["fold/map"]
    folded = tmp_path / "run" / "folded"
    files = [tmp_path / "run" / "model.onnx"]
    if which == "torchvision":
        files = [tmp_path / "run" / "model" / f"{part}.onnx" for part in ("backbone", "head")]
        assert {path.name for path in folded.iterdir()} == {"backbone", "head", "parts.json", "rest.safetensors"}
        whole = load_folded(folded, small_fcos())
        found = whole([torch.rand(3, 64, 64)])
        assert set(found[0]) == {"boxes", "scores", "labels"}
    for path in files:
        known = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
        assert json.loads(known["bnre_exp.classes"]) == [str(digit) for digit in range(10)]
        assert '"mean": [0.0, 0.0, 0.0]' in " ".join(known.values())  # detectors normalize for themselves
    again, said = job(tmp_path, *how, name="again")
    assert said.count("reused") >= 6
    assert {n: v for n, v in again.metrics.items() if "seconds" not in n} == {
        n: v for n, v in metrics.items() if "seconds" not in n
    }


def test_a_part_that_is_not_there_is_told_before_training(tmp_path):
    how = [*DETECTORS["torchvision"], "model.submodules=[backbone, neck]", "train.epochs=10000"]
    with pytest.raises(UserError, match="the network has no .?neck.?; at its top it has backbone, "):
        job(tmp_path, *how)


def test_a_detector_whose_classes_are_others_than_the_datasets(tmp_path):
    how = [*DETECTORS["torchvision"], "+model.kwargs.num_classes=4", "train.epochs=10000"]
    with pytest.raises(UserError, match="task: training fails on the first 8 images: .*FCOS.*Detection"):
        job(tmp_path, *how)
