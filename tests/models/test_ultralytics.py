"""Ultralytics' networks by name and from files, beside their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks

from bnre_exp import QuantScheme, calibrate, evaluate, fold_batch_norms, quantize, train
from bnre_exp.errors import UserError
from bnre_exp.models.build import build_model, check_output
from bnre_exp.models.ultralytics import build_ultralytics, ultralytics_model
from bnre_exp.tasks import Classification

TARGET = "bnre_exp.models.ultralytics_model"


def built(name: str, classes: int | None = 3, **kwargs: Any) -> Any:
    return build_model(TARGET, name=name, num_classes=classes, kwargs=kwargs)


def randomized(module: Any) -> Any:
    """Batch norms' values differ from those of new ones, and from one class to the other."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.1, 0.1)
            part.running_var.uniform_(0.5, 2)
    return module


def written(path: Path, name: str = "yolov8n", classes: int = 3, **kwargs: Any) -> Path:
    """A file as Ultralytics' trainer leaves it, in half precision and without gradients."""
    kind = {"": "Detection", "seg": "Segmentation", "pose": "Pose", "cls": "Classification", "obb": "OBB"}
    network = getattr(tasks, kind[name.partition("-")[2]] + "Model")(f"{name}.yaml", nc=classes, verbose=False)
    for parameter in randomized(network).half().parameters():
        parameter.requires_grad_(False)
    torch.save({"epoch": -1, "model": network, "ema": None, "train_args": {"imgsz": 64, **kwargs}}, path)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("yolov5n", "DetectionModel"),
        ("yolov8n.yaml", "DetectionModel"),
        ("yolov10n", "DetectionModel"),
        ("yolo11n-seg", "SegmentationModel"),
        ("yolov8n-pose", "PoseModel"),
        ("yolo12n", "DetectionModel"),
        ("yolov8n-cls", "ClassificationModel"),
    ],
)
def test_a_network_by_name_is_theirs_with_the_datasets_classes(name: str, kind: str) -> None:
    found = built(name)
    assert type(found.module).__name__ == kind and len(found.module.names) == 3
    assert found.takes_unit_range and not found.pretrained and found.preprocessing is None
    assert bool(found.notes) == (kind == "ClassificationModel")
    theirs = getattr(tasks, kind)(f"{name.removesuffix('.yaml')}.yaml", nc=3, verbose=False)
    ours, expected = found.module.state_dict(), theirs.state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in expected.items()}
    found.module.load_state_dict(randomized(theirs).state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        output, same = found.module.eval()(images), theirs.eval()(images)
    if kind == "ClassificationModel":
        torch.testing.assert_close(output.softmax(1), same[0])
        torch.testing.assert_close(output, same[1])
    else:
        boxes, same_boxes = (given if isinstance(given, torch.Tensor) else given[0] for given in (output, same))
        same_boxes = same_boxes[0] if isinstance(same_boxes, tuple) else same_boxes
        torch.testing.assert_close(boxes, same_boxes)


def test_building_says_nothing(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    for name in ("yolov8n-cls", "yolov8n"):
        built(name)
    assert capsys.readouterr() == ("", "") and not caplog.records


def test_a_classification_network_gives_logits_in_both_modes_and_is_trained_and_folded() -> None:
    network = built("yolov8n-cls", 3).module
    images, labels = torch.rand(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    check_output(network, images, Classification(3))
    for mode in (True, False):
        logits = network.train(mode)(images)
        assert logits.shape == (6, 3) and bool((logits.sum(1) - 1).abs().max() > 1e-2)
    history = train(network, [(images, labels)], 4, lr=0.001, optimizer="adamw", schedule="constant")
    assert history[-1].loss < history[0].loss / 2
    trained = evaluate(network, [(images, labels)])
    sim = quantize(network, images, QuantScheme(8, 8))
    calibrate(sim, [images], 1)
    folded, report = fold_batch_norms(sim)
    bns = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(report.folded) == len(bns) and not report.kept
    assert evaluate(folded, [(images, labels)]).loss == pytest.approx(trained.loss, abs=0.2)


def test_more_classes_of_a_file_or_a_data_sets_are_told_apart(tmp_path: Path) -> None:
    path = written(tmp_path / "best.pt", classes=4)
    assert len(build_ultralytics(None, None, str(path), True, {}).module.names) == 4
    with pytest.raises(UserError, match=r"tells 4 classes apart \(0, 1, 2, 3\), the dataset has 3"):
        build_ultralytics(None, 3, str(path), True, {})


@pytest.mark.parametrize("name", ["yolov8n", "yolov10n", "yolov8n-seg", "yolov8n-cls"])
def test_a_file_is_read_in_single_precision_trainable_and_gives_what_theirs_gives(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "best.pt", name)
    found = build_model(TARGET, path=str(path), num_classes=3, trusted=True)
    assert found.pretrained
    module, theirs = found.module.eval(), YOLO(str(path)).model.eval()
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32, torch.int64}
    fixed = [key for key, value in module.named_parameters() if not value.requires_grad]
    assert all(".dfl" in key for key in fixed) and bool(fixed) == (name != "yolov8n-cls")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        output, same = module(images), theirs(images)[0]
    if name == "yolov8n-cls":
        torch.testing.assert_close(output.softmax(1), same)
    elif name == "yolov8n-seg":
        for one, other in zip(output, same):
            torch.testing.assert_close(one, other)
    else:
        torch.testing.assert_close(output, same)


def test_a_pickle_is_not_opened_unless_it_is_trusted(tmp_path: Path) -> None:
    path = written(tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"is a pickle, and reading it runs.*set model.trusted=true"):
        ultralytics_model(path=str(path), num_classes=3)


def test_files_that_hold_no_such_network_are_told(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no pickle")
    torch.save({"state": torch.zeros(3)}, tmp_path / "weights.pt")
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "linear.pt")
    written(tmp_path / "obb.pt", "yolov8n-obb")
    (tmp_path / "yolov8n.yaml").write_text("nc: 3")
    for name, message in {
        "text.pt": "cannot be read by Ultralytics",
        "weights.pt": "cannot be read by Ultralytics",
        "linear.pt": "cannot be read by Ultralytics|holds a Linear",
        "obb.pt": "holds a OBBModel; expected one for detect, segment, pose, classify",
        "yolov8n.yaml": "expected a .pt file",
        "missing.pt": "there is no such file",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            ultralytics_model(path=str(tmp_path / name), num_classes=3, trusted=True)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "classes", "kwargs", "message"),
    [
        ("yolov99n", 3, {}, "no such network.*expected one such as yolov8n"),
        ("resnet18", 3, {}, "no such network"),
        ("yolov8n-obb", 3, {}, "a network for obb; expected one for detect, segment, pose, classify"),
        ("rtdetr-l", 3, {}, "rtdetr-l: a network for no task"),
        ("yolov8n-world", 3, {}, "yolov8n-world cannot be built"),
        ("yolov8n", None, {}, "num_classes is not set"),
        ("yolov8n", 3, {"depth": 2}, r"cannot be built with model.kwargs=\{'depth': 2\}"),
        (None, 3, {}, "model.name is not set"),
    ],
)
def test_names_and_settings_that_do_not_fit_are_told(
    name: str | None, classes: int | None, kwargs: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ultralytics_model(name, classes, **kwargs)


def test_weights_are_given_as_a_file() -> None:
    with pytest.raises(UserError, match="give a file as model.path"):
        build_model(TARGET, name="yolov8n", num_classes=3, weights="DEFAULT")
