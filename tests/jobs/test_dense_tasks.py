"""Segmentation, denoising and keypoints go through the whole runner, each with its own targets and metric."""

from __future__ import annotations

import io
import json
import sys

import onnxruntime
import pytest
from rich.console import Console
from torch import Tensor, nn

from bnre_exp import UserError, load_folded
from bnre_exp.cli.compose import compose_config
from bnre_exp.cli.main import main
from bnre_exp.jobs.run import run
from bnre_exp.jobs.sweep import job_rows
from tests.jobs.test_classes import setting_of

SCENES = ["dataset=digit_scenes", "dataset.kwargs={size: 32, most: 2, count: 96}", "dataset.image_size=32"]
SMALL = [
    *SCENES, "dataset.batch_size=16", "dataset.eval_batch_size=32", "quant=w4a8", "quant.calib_batches=2",
    "reest.num_batches=3", "qat=off", "train.epochs=2", "train=adamw", "train.lr=2e-3", "tracking.enabled=false",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("verified_here")


class Points(nn.Module):
    """Coordinates of points, of an image with one channel."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32 * 64, 2 * count)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).sigmoid()


class Shrinking(nn.Sequential):
    """Images with a pixel less on every side."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))


TASKS = {  # by task: the network, the headline metric, and whether it is better the higher
    "segmentation": (["model._target_=tests.tasks.scenes.UNet", "+model.kwargs.outputs=11"], "miou"),
    "regression": (["model._target_=tests.tasks.scenes.UNet", "+model.kwargs.outputs=1"], "psnr"),
    "keypoints": (["model._target_=tests.jobs.test_dense_tasks.Points"], "pck"),
}


def job(folder, *overrides: str, name: str = "run"):
    config = compose_config([*SMALL, f"runtime.output_dir={folder}", *overrides])
    console = Console(record=True, width=160, file=io.StringIO())
    return run(config, run_dir=folder / name, overrides=overrides, console=console), console.export_text()


@pytest.mark.parametrize("task", [pytest.param(t, marks=[] if t == "keypoints" else pytest.mark.slow) for t in TASKS])
def test_every_stage_goes_by_the_task(tmp_path, task):
    network, headline = TASKS[task]
    results, said = job(tmp_path, f"task={task}", "model=custom", *network, "export=all")
    metrics = results.metrics
    stages = ("fp32", "ptq", "reest", "fold", "export", "encodings", "onnx")
    assert all(f"{stage}/{headline}" in metrics for stage in stages)
    assert metrics["reest/delta_" + headline] == metrics[f"reest/{headline}"] - metrics[f"ptq/{headline}"]
    assert metrics[f"export/{headline}"] == metrics[f"fold/{headline}"]
    assert metrics[f"onnx/{headline}_agreement"] >= 0.99 and metrics[f"encodings/{headline}_agreement"] >= 0.99
    assert abs(metrics[f"onnx/{headline}"] - metrics[f"fold/{headline}"]) < 0.02 * abs(metrics[f"fold/{headline}"])
    assert "ONNX Runtime" in said
    again, _ = job(tmp_path, f"task={task}", "model=custom", *network, "export=all", name="again")
    known = {name: value for name, value in metrics.items() if "seconds" not in name}
    assert {name: value for name, value in again.metrics.items() if "seconds" not in name} == known
    names = json.loads(session(tmp_path / "run").get_modelmeta().custom_metadata_map.get("bnre_exp.classes", "null"))
    expected = ["background", *map(str, range(10))] if task == "segmentation" else None
    assert names == expected
    loaded = load_folded(tmp_path / "run" / "folded")
    assert loaded.meta.get("classes") == (None if expected is None else tuple(expected))
    inputs = session(tmp_path / "run").get_inputs()
    assert [inp.shape[1] for inp in inputs] == [1]  # a network with one channel is given images with one


def session(folder):
    return onnxruntime.InferenceSession(folder / "model.onnx")


@pytest.mark.slow
def test_another_task_on_the_same_scenes_is_another_job(tmp_path):
    network = ["model=custom", "model._target_=tests.tasks.scenes.UNet", "+model.kwargs.outputs=11", "train.epochs=1"]
    network += ["task=segmentation", "export=checkpoint"]
    job(tmp_path, *network, name="first")
    _, said = job(tmp_path, *network, "task.kwargs.loss=dice_cross_entropy", name="second")
    assert "reused" not in said
    _, said = job(tmp_path, *network, "task.kwargs.loss=dice_cross_entropy", name="third")
    assert said.count("reused") >= 5


@pytest.mark.slow
def test_a_sweep_of_segmenters_is_compared_by_miou(tmp_path, monkeypatch, capsys):
    network = ["model=custom", "model._target_=tests.tasks.scenes.UNet", "+model.kwargs.outputs=11"]
    arguments = [*SMALL, *network, "task=segmentation", "export=checkpoint", f"runtime.output_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["bnre_exp", "-m", *arguments, "quant.weight_bits=3,8"])
    assert main() == 0
    (sweep,) = (tmp_path / "multirun").iterdir()
    assert [row.headline.name for row in job_rows(sweep)] == ["miou", "miou"]
    assert (sweep / "miou_by_bits.png").exists() and "mIoU" in (sweep / "comparison.md").read_text()
    capsys.readouterr()


WRONG = {
    "a task that the dataset has no targets for": (
        ["dataset=digits", "~dataset.kwargs.size", "~dataset.kwargs.most", "~dataset.kwargs.count", "task=segmentation",
         "model._target_=tests.tasks.scenes.UNet", "+model.kwargs.outputs=10"],
        "mask",
    ),
    "classes of masks and of the network": (
        ["task=segmentation", "model._target_=tests.tasks.scenes.UNet", "+model.kwargs.outputs=7"],
        r"gives \[2, 7, 32, 32\]; segmentation into 11 classes",
    ),
    "a segmenter for classes of images": (
        ["task=regression", "task.kwargs.metric=miou", "model._target_=tests.tasks.scenes.UNet"],
        "metric='miou'; expected one of psnr",
    ),
    "a metric of images, of numbers": (
        ["task=regression", "model._target_=tests.jobs.test_dense_tasks.Points"],
        r"metric=psnr, but the network gives \[2, 8\]",
    ),
    "a classifier of scenes": (["task=classification", "model._target_=tests.tasks.scenes.UNet"], "dataset=digits"),
    "a segmenter as a detector": (
        ["task=detection", "model._target_=tests.tasks.scenes.UNet", "+model.kwargs.outputs=4"],
        "expects a list of dicts with boxes",
    ),
    "a picture of another size": (
        ["task=regression", "model._target_=tests.jobs.test_dense_tasks.Shrinking"],
        r"targets of a batch are .*; regression expects the same shape",
    ),
    "one point, and a box around it": (
        ["task=keypoints", "model._target_=tests.jobs.test_dense_tasks.Points", "+model.kwargs.count=1"],
        r"around one keypoint there is no box to measure by; set task.kwargs.reference=image",
    ),
    "an objective of another task": (
        ["task=segmentation", "model._target_=tests.tasks.scenes.UNet", "+model.kwargs.outputs=11",
         "objective=fold/val_top1"],
        "objective=fold/val_top1: the task does not measure that; it measures fold/val_miou, ",
    ),
    "points of another number": (
        ["task=keypoints", "+task.kwargs.num_keypoints=5", "model._target_=tests.jobs.test_dense_tasks.Points"],
        r"gives \[2, 8\]; expected heatmaps \[2, 5, h, w\]",
    ),
    "a task of another library's networks": (
        ["task=ultralytics", "model._target_=tests.tasks.scenes.UNet", "+model.kwargs.outputs=4"],
        "UNet is no network of Ultralytics",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_told_before_training(tmp_path, what):
    overrides, message = WRONG[what]
    with pytest.raises(UserError, match=message):
        job(tmp_path, "model=custom", *overrides, "train.epochs=10000", "train.lr=1e-3")


def test_a_network_of_one_channel_takes_means_of_three(tmp_path):
    network = ["model=custom", "model._target_=tests.tasks.scenes.UNet", "+model.kwargs.outputs=11"]
    means = ["dataset.default_mean=[0.4, 0.5, 0.6]", "dataset.default_std=[0.1, 0.2, 0.3]"]
    setting = setting_of(tmp_path, *SCENES, "task=segmentation", *network, *means)
    how = setting.loaders.preprocessing
    assert how.mean == pytest.approx((0.5,)) and how.std == pytest.approx((0.2,)) and setting.example().shape[1] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=coco", "task=keypoints"], "coco has targets of the kind 'objects'.*set task=detection"),
        (["dataset=coco"], "coco has targets of the kind 'objects', and the task takes 'class'"),
        (["dataset=image_masks", "task=detection"], "image_masks has targets of the kind 'mask'.*task=segmentation"),
    ],
)
def test_a_dataset_says_which_task_it_is_for(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        setting_of(tmp_path, *overrides, f"dataset.root={tmp_path}")
