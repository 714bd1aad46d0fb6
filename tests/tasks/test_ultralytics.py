"""Ultralytics' networks: loss and metrics beside their own criteria and validators, and what does not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn import tasks
from ultralytics.utils import nms

from bnre_exp import UserError, evaluate, train
from bnre_exp.models.ultralytics import build_ultralytics
from bnre_exp.tasks import Ultralytics
from tests.networks import flat_cnn

SIZE = 64
DETECTORS = ["yolov5n", "yolov8n", "yolov10n", "yolo11n", "yolo12n", "yolo26n"]
KINDS = {"detect": "yolov8n", "segment": "yolov8n-seg", "pose": "yolov8n-pose"}


def network(name: str, classes: int = 2, **kwargs: Any) -> Any:
    """Random, but its detections differ from image to image, in place, size, class and score."""
    kwargs = {"data_kpt_shape": (4, 3), **kwargs} if name.endswith("-pose") else kwargs
    module: Any = build_ultralytics(name, classes, None, False, kwargs).module
    head = module.model[-1]
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        for boxes, scores in zip(head.cv2, head.cv3):
            boxes[-1].bias.copy_((-1.5 * torch.arange(boxes[-1].out_channels / 4)).repeat(4))
            boxes[-1].weight.mul_(1.5)
            scores[-1].weight.mul_(4)
            scores[-1].bias.fill_(-2)
        module.train()(torch.rand(8, 3, SIZE, SIZE))
    return module.eval()


def pictures(count: int = 7) -> Tensor:
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8)


def as_targets(found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Objects where a network sees some, or nearly so: none in the second image, in the others up to four."""
    targets = []
    for place, image in enumerate(found):
        boxes = (image["bboxes"] + 2 * torch.rand(len(image["bboxes"]), 4) - 1).round().clamp(2, SIZE - 2)
        is_seen = ((boxes[:, 2:] - boxes[:, :2]) > 5).all(1) & ((boxes - image["bboxes"]).abs() < 4).all(1)
        fits = is_seen.nonzero()[:, 0][: 0 if place == 1 else 4]
        boxes, target = boxes[fits], {"labels": image["cls"][fits].long()}
        target["masks"] = torch.zeros(len(fits), SIZE, SIZE, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(target["masks"], boxes.long().tolist()):
            mask[top:bottom, left:right] = True
        if "keypoints" in image:
            points = image["keypoints"][fits]
            seen = (torch.rand(len(fits), 4, 1) < 0.8).float()
            target["keypoints"] = torch.cat([(points[..., :2] + torch.randn(len(fits), 4, 2)).clamp(0, 63), seen], -1)
        targets.append({"boxes": boxes, **target})
    return targets


def scenes(module: Any, count: int = 7) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images of bytes, and objects for them of which the network finds some."""
    images, validator = pictures(count), Ultralytics(module).validator(torch.device("cpu"))
    with torch.no_grad():
        return images, as_targets(validator.postprocess(module(images.float() / 255)))


def pairs(images: Tensor, targets: list[Any], size: int) -> list[tuple[Tensor, list[Any]]]:
    return [(images[i : i + size].float() / 255, targets[i : i + size]) for i in range(0, len(images), size)]


def by_hand(images: Tensor, targets: list[dict[str, Tensor]], kind: str) -> dict[str, Any]:
    """The batch as Ultralytics' documentation has it, object by object."""
    batch: dict[str, Any] = {"img": images, "batch_idx": [], "cls": [], "bboxes": [], "masks": [], "keypoints": []}
    for place, target in enumerate(targets):
        for number, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist()):
            batch["batch_idx"].append(float(place))
            batch["cls"].append([float(target["labels"][number])])
            batch["bboxes"].append([(x1 + x2) / 2 / SIZE, (y1 + y2) / 2 / SIZE, (x2 - x1) / SIZE, (y2 - y1) / SIZE])
            batch["masks"].append(target["masks"][number, ::4, ::4].tolist())
            if kind == "pose":
                points = target["keypoints"][number]
                batch["keypoints"].append([[x / SIZE, y / SIZE, 2 * v] for x, y, v in points.tolist()])
    return {name: value if name == "img" else torch.tensor(value, dtype=torch.float32) for name, value in batch.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_their_criterion_on_their_own_batch(kind: str) -> None:
    module = network(KINDS[kind])
    images, targets = scenes(module)
    task, (batch,) = Ultralytics(module), pairs(images, targets, 7)
    output = task.feed(module.train(), batch)
    theirs = copy.copy(module)
    theirs.args = get_cfg(overrides={"overlap_mask": False})
    expected = theirs.init_criterion()(output, by_hand(batch[0], targets, kind))[0].sum() / 7
    assert task.kind == kind and float(expected.detach()) > 1
    torch.testing.assert_close(task.loss(output, batch), expected)


@pytest.mark.parametrize("name", [*DETECTORS, "yolo26n-seg", "yolo26n-pose"])
def test_every_generation_has_a_loss_of_all_its_weights_and_metrics(name: str) -> None:
    module = network(name)
    images, targets = scenes(module, 5)
    task, data = Ultralytics(module), pairs(images, targets, 3)
    found = evaluate(module, data, task=task)
    assert found.map > 0 and found.count == 5 and found.predictions.shape == (5, 100, 6)
    task.loss(task.feed(module.train(), data[0]), data[0]).backward()
    assert not [key for key, value in module.named_parameters() if value.grad is None and value.requires_grad]


def written(folder: Path, images: Tensor, targets: list[dict[str, Tensor]], kind: str) -> str:
    """A folder as their loaders read it; its description."""
    for name in ("images", "labels"):
        (folder / name / "val").mkdir(parents=True)
    for place, (image, target) in enumerate(zip(images, targets)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "images/val" / f"{place}.png")
        x1, y1, x2, y2 = target["boxes"].double().unbind(1)
        rows = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1) / SIZE
        if kind == "segment":
            rows = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], 1) / SIZE
        if kind == "pose":
            points = target["keypoints"].double() / torch.tensor([SIZE, SIZE, 0.5])
            rows = torch.cat([rows, points.flatten(1)], 1)
        lines = [
            " ".join(str(n) for n in [label, *row]) for label, row in zip(target["labels"].tolist(), rows.tolist())
        ]
        (folder / "labels/val" / f"{place}.txt").write_text("\n".join(lines))
    extra = "kpt_shape: [4, 3]\nflip_idx: [0, 1, 2, 3]\n" if kind == "pose" else ""
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images/val\nval: images/val\nnames: [a, b]\n{extra}")
    return str(folder / "data.yaml")


def validated(module: Any, name: str, data: str, folder: Path) -> Any:
    theirs = YOLO(f"{name}.yaml")
    theirs.model = copy.deepcopy(module)
    theirs.model.model[-1].export = False
    how = {"imgsz": SIZE, "batch": 4, "rect": False, "plots": False, "workers": 0, "device": "cpu", "verbose": False}
    return theirs.val(data=data, project=str(folder), name="out", **how)


def their_batches(data: str, kind: str, size: int) -> list[dict[str, Any]]:
    """As their loader gives them, with one mask an image."""
    known = check_det_dataset(data)
    items = build_yolo_dataset(get_cfg(overrides={"task": kind, "imgsz": SIZE}), known["val"], size, known, mode="val")
    return [
        items.collate_fn([items[i] for i in range(start, min(start + size, len(items)))])
        for start in range(0, len(items), size)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_metrics_are_those_of_their_validation_of_the_same_images(kind: str, tmp_path: Path) -> None:
    module = network(KINDS[kind])
    images, targets = scenes(module, 10)
    data = written(tmp_path, images, targets, kind)
    expected = validated(module, KINDS[kind], data, tmp_path)
    for form, batches in {"ours": pairs(images, targets, 3), "theirs": their_batches(data, kind, 3)}.items():
        found = evaluate(module, batches, task=Ultralytics(module))
        assert found.count == 10 and 0.05 < found.map < 1
        assert found.map == pytest.approx(expected.box.map, abs=1e-6)
        if kind == "detect":
            assert found.value == found.map and found.map_50 == pytest.approx(expected.box.map50, abs=1e-6)
        if kind == "pose":
            assert found.value == found.pose_map == pytest.approx(expected.pose.map, abs=1e-6)
            assert found.pose_map_50 == pytest.approx(expected.pose.map50, abs=1e-6)
        if kind == "segment":  # their files hold polygons, which they fill with one pixel more on two sides
            close = 1e-6 if form == "theirs" else 0.1
            assert found.value == found.mask_map == pytest.approx(expected.seg.map, abs=close)
            assert found.mask_map_50 == pytest.approx(expected.seg.map50, abs=close)


def test_training_lowers_the_loss_and_evaluation_changes_nothing() -> None:
    module = network("yolov8n")
    images, targets = scenes(module, 6)
    task, data = Ultralytics(module), pairs(images, targets, 3)
    history = train(module, data, 3, lr=3e-4, optimizer="adamw", schedule="constant", task=task)
    assert history[-1].loss < history[0].loss
    state = copy.deepcopy(module.state_dict())
    assert evaluate(module, data, task=task).metrics == evaluate(module, pairs(images, targets, 6), task=task).metrics
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_a_network_of_theirs_is_left_as_it_was_and_its_own_settings_weigh_the_loss() -> None:
    yolo = YOLO("yolov8n.yaml")
    module: Any = yolo.model
    images, targets = pictures(2), [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([3])}] * 2
    batch = (images.float() / 255, targets)
    known, names = dict(module.args), set(vars(module))
    losses = []
    for gains in ({}, {"box": 0.0, "cls": 0.0, "dfl": 0.0}):
        module.args = {**known, **gains}
        task = Ultralytics(module)
        losses.append(float(task.loss(task.feed(module.train(), batch), batch).detach()))
        assert module.args == {**known, **gains} and type(module.args) is dict and set(vars(module)) == names
    assert losses[0] > 1 and losses[1] == 0
    del module.args
    task = Ultralytics(module)  # as an untrained network has none
    assert float(task.loss(task.feed(module, batch), batch).detach()) > 1 and not hasattr(module, "args")


def test_networks_that_also_return_their_raw_output_are_measured_alike() -> None:
    for name in ("yolov8n-seg", "yolov10n"):
        module = network(name)
        images, targets = scenes(module, 3)
        data = pairs(images, targets, 3)
        expected = evaluate(module, data, task=Ultralytics(module))
        module.model[-1].export = False
        found = evaluate(module, data, task=Ultralytics(module))
        assert found.metrics == expected.metrics and torch.equal(found.predictions, expected.predictions)


@pytest.mark.parametrize("name", ["yolov10n", "yolo26n-seg"])
def test_the_head_without_suppression_is_measured_where_the_network_is_set_to_it(name: str) -> None:
    module = network(name)
    images, targets = scenes(module, 4)
    module.end2end = True
    head = module.model[-1]
    found = evaluate(module, pairs(images, targets, 4), task=Ultralytics(module))
    with torch.no_grad():
        best = Ultralytics(module).compared(module(images.float() / 255))
    assert best.shape[:2] == (4, 84) and head.max_det == 300
    kept = torch.where(best[..., 4] > 0.001, best[..., 4], 0)
    assert bool((kept > 0).all(0).any())
    torch.testing.assert_close(found.predictions[:, :84, 4], kept)


def test_no_image_is_left_out_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network("yolov8n")
    images, targets = scenes(module, 4)
    data = pairs(images, targets, 4)
    expected = evaluate(module, data, task=Ultralytics(module))
    seconds = iter(range(0, 10**6, 100))
    monkeypatch.setattr(nms.time, "time", lambda: next(seconds))
    assert evaluate(module, data, task=Ultralytics(module)).metrics == expected.metrics


def test_images_without_objects_have_a_loss_but_no_metric() -> None:
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    empty["masks"] = torch.zeros(0, SIZE, SIZE, dtype=torch.bool)
    images = torch.rand(2, 3, SIZE, SIZE)
    for name in ("yolov8n", "yolov8n-seg", "yolov8n-pose"):
        task = Ultralytics(module := network(name))
        batch = (images, [empty, {key: value for key, value in empty.items() if key != "masks"}])
        loss = task.loss(task.feed(module.train(), batch), batch)
        loss.backward()
        assert 0 < float(loss.detach()) < 100
        with pytest.raises(UserError, match="no image has an object; mAP is not defined"):
            evaluate(module, [batch], task=task)


@pytest.mark.parametrize("counts", [(2, 0), (1, 1), (3, 1)])
def test_masks_of_an_image_and_masks_of_objects_are_told_apart(counts: tuple[int, int]) -> None:
    places = torch.arange(2).repeat_interleave(torch.tensor(counts)).float()
    every = torch.zeros(len(places), 16, 16)
    together, number = torch.zeros(2, 16, 16), [0, 0]
    for mask, place in zip(every, places.int().tolist()):
        rows = slice(4 * number[place], 4 * number[place] + 3)
        number[place] += 1
        mask[rows], together[place, rows] = 1.0, number[place]
    task = Ultralytics(network("yolov8n-seg"))
    common = {"img": torch.rand(2, 3, SIZE, SIZE), "cls": places[:, None] * 0, "bboxes": torch.rand(len(places), 4)}
    for masks in (together, every):
        made = task.theirs({**common, "batch_idx": places, "masks": masks})
        assert torch.equal(made["masks"], every)


OBJECT = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([0])}
POINTS = torch.zeros(1, 5, 3)


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("yolov8n", torch.zeros(1), "targets of a batch are a tensor.*expects a list of dicts with boxes and labels"),
        ("yolov8n", [OBJECT, OBJECT], "expects a list of dicts with boxes and labels, one an image"),
        ("yolov8n", [{"boxes": OBJECT["boxes"]}], "expects a list of dicts with boxes and labels"),
        ("yolov8n-seg", [OBJECT], "the network segments objects, and the dataset gives no masks"),
        ("yolov8n-pose", [OBJECT], "the network tells poses, and the dataset gives no keypoints"),
        (
            "yolov8n-pose",
            [{**OBJECT, "keypoints": POINTS}],
            r"tells 4 keypoints.*expected \[n, 4, 3\], got \[1, 5, 3\]",
        ),
        ("yolov8n", {"cls": POINTS}, "a dict without bboxes, batch_idx; expected one of Ultralytics' loaders"),
        ("yolov8n-seg", {"cls": POINTS, "bboxes": POINTS, "batch_idx": POINTS}, "a dict without masks"),
    ],
)
def test_batches_without_what_the_network_is_taught_are_told(name: str, targets: Any, message: str) -> None:
    module, images = network(name), torch.rand(1, 3, SIZE, SIZE)
    task = Ultralytics(module)
    batch = {"img": images, **targets} if isinstance(targets, dict) else (images, targets)
    for call in (
        lambda: task.loss(task.feed(module.train(), batch), batch),
        lambda: evaluate(module, [batch], task=task),
    ):
        with pytest.raises(UserError, match=message):
            call()


class Head(nn.Module):
    nc = 3


def test_other_networks_are_refused() -> None:
    for module in (flat_cnn(), Head(), tasks.DetectionModel("yolov8n.yaml", nc=2, verbose=False).model):
        with pytest.raises(UserError, match="is no network of Ultralytics.*there is task=detection"):
            Ultralytics(module)
    plain = tasks.ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False)
    for module in (plain, build_ultralytics("yolov8n-cls", 3, None, False, {}).module):
        with pytest.raises(UserError, match="head is a Class.*For classification there is task=classification"):
            Ultralytics(module)
    with pytest.raises(UserError, match="head is a OBB; this task serves detect, segment and pose"):
        Ultralytics(tasks.OBBModel("yolov8n-obb.yaml", nc=3, verbose=False))


def test_a_task_begins_with_its_network() -> None:
    task, module = Ultralytics(num_classes=2), network("yolov8n-seg")
    images, targets = scenes(module, 2)
    (batch,) = pairs(images, targets, 2)
    with pytest.raises(UserError, match=r"needs the network in floating point: Ultralytics\(model\)"):
        task.loss(task.feed(module.train(), batch), batch)
    assert task.headline.name == "map"
    task.begin(module)
    assert (task.headline.name, task.kind, task.targets) == ("mask_map", "segment", "objects")
    first = float(task.loss(task.feed(module.train(), batch), batch).detach())
    task.begin(other := network("yolov8n", 2))
    assert task.headline.name == "map"
    assert float(task.loss(task.feed(other.train(), batch), batch).detach()) != first


def test_checks() -> None:
    task = Ultralytics(network("yolov8n"), num_classes=2)
    task.check_output((torch.zeros(2, 6, 84), torch.zeros(1)), 2)
    with pytest.raises(UserError, match=r"gives \[2, 6\]; expected \[2, 4 \+ classes, boxes\]"):
        task.check_output(torch.zeros(2, 6), 2)
    with pytest.raises(UserError, match="in which no tensor was found"):
        task.check_output({"note": "x"}, 2)
    task.check_labels({"train": (0, 1), "test": (0, 0)})
    with pytest.raises(UserError, match="the test objects have classes from 0 to 2; expected 0 to 1"):
        task.check_labels({"train": (0, 1), "test": (0, 2)})
    with pytest.raises(UserError, match="the test images have no objects"):
        task.check_labels({"train": (0, 1)})
    with pytest.raises(UserError, match="label_smoothing=0.1"):
        task.loss(torch.zeros(1), (torch.zeros(1, 3, 8, 8), [OBJECT]), 0.1)
    with pytest.raises(UserError, match="the batches hold no samples"):
        task.meter().compute()
