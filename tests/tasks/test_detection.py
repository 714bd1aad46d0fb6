"""Detection: losses and labels beside torchvision's detectors, metrics beside pycocotools, and what does not fit."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

from bnre_exp import UserError, evaluate, train
from bnre_exp.tasks import Detection

SIZE = 64


def backbone() -> Any:
    layers = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    network: Any = nn.Sequential(*layers)
    network.out_channels = 32
    return network


def detector(kind: str, outputs: int = 3) -> nn.Module:
    """A small one of torchvision's kinds, for images of their own size; outputs: with background where it has one."""
    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,),), ((1.0,),))
    how: dict[str, Any] = {"min_size": SIZE, "max_size": SIZE}
    if kind == "FCOS":
        return FCOS(backbone(), outputs, anchor_generator=anchors, score_thresh=0.01, **how)
    if kind == "SSD":
        layers = backbone()
        layers.out_channels = [32]
        return SSD(layers, DefaultBoxGenerator([[2]], scales=[0.2, 0.4]), (SIZE, SIZE), outputs)
    pool = MultiScaleRoIAlign(["0"], 4, 2)
    return FasterRCNN(backbone(), outputs, rpn_anchor_generator=anchors, box_roi_pool=pool, **how)


def squares(count: int, seed: int = 0, least: int = 1) -> list[tuple[Tensor, list[dict[str, Tensor]]]]:
    """Batches of at most four images with a red square (class 0) or a green one (class 1), or with none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    images, targets = 0.1 * torch.rand(count, 3, SIZE, SIZE, generator=generator), []
    for image in images:
        label, left, top = draw(2), 8 * draw(6), 8 * draw(6)
        n = 1 if least else draw(2)
        image[label, top : top + 16, left : left + 16] += 0.9 * n
        boxes = torch.tensor([[left, top, left + 16, top + 16]]).float()[:n]
        targets.append({"boxes": boxes, "labels": torch.tensor([label])[:n]})
    return [(images[i : i + 4], targets[i : i + 4]) for i in range(0, count, 4)]


def objects_and_detections(count: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """What was found and what is there, of three classes: near misses, wrong classes, doubles; images with none."""
    found, targets = [], []
    for image in range(count):
        corners = torch.rand(image % 4, 2) * 80
        boxes = torch.cat([corners, corners + 12 + 20 * torch.rand(image % 4, 2)], 1)
        labels = torch.randint(3, (image % 4,))
        near = torch.cat([boxes + 5 * torch.randn(len(boxes), 4) * (image % 3) / 2, boxes + 2, torch.rand(2, 4) * 9])
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
        given = torch.cat([labels, torch.randint(3, (len(boxes) + 2,))])
        found.append({"boxes": near, "labels": given, "scores": torch.rand(len(near))})
        targets.append({"boxes": boxes, "labels": labels})
    return found, targets


def measured(task: Detection, found: list[Any], targets: list[Any], split: int = 4) -> Any:
    meter = task.meter()
    for i in range(0, len(found), split):
        meter.update(found[i : i + split], (torch.zeros(len(found[i : i + split]), 3, 8, 8), targets[i : i + split]))
    return meter.compute()


def by_pycocotools(found: list[Any], targets: list[Any]) -> list[float]:
    """mAP, at 0.5, at 0.75, and the recall of 100 detections."""

    def rows(images: list[Any]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for place, image in enumerate(images):
            for i, (x1, y1, x2, y2) in enumerate(image["boxes"].tolist()):
                row = {"id": len(made) + 1, "image_id": place, "category_id": int(image["labels"][i]), "iscrowd": 0}
                row |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                made.append(row | ({"score": float(image["scores"][i])} if "scores" in image else {}))
        return made

    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": place} for place in range(len(targets))],
            "annotations": rows(targets),
            "categories": [{"id": label} for label in range(3)],
        }
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(rows(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(evaluation.stats[i]) for i in (0, 1, 2, 8)]


def test_metrics_are_those_of_pycocotools_and_torchmetrics_whatever_the_batches() -> None:
    found, targets = objects_and_detections(9)
    result = measured(Detection(3), found, targets)
    values = [result.metrics[name] for name in ("map", "map_50", "map_75", "mar_100")]
    assert values == pytest.approx(by_pycocotools(found, targets), abs=1e-6)
    peer = MeanAveragePrecision()
    peer.update(found, targets)
    assert result.map == pytest.approx(float(peer.compute()["map"]), abs=1e-6)
    assert 0.2 < result.map < 0.9 and result.headline.name == "map" and result.count == 9
    assert measured(Detection(3), found, targets, split=2).metrics == result.metrics
    assert result.predictions.shape == (9, 100, 6) and result.scores.shape == (9,)


def test_images_without_objects_lower_the_metric_where_something_is_found() -> None:
    box, nothing = torch.tensor([[0.0, 0, 10, 10]]), torch.zeros(0, 4)
    none = {"boxes": nothing, "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    right = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.8])}
    wrong = {**right, "scores": torch.tensor([0.9])}
    assert measured(Detection(2), [right, none], [right, none]).map == pytest.approx(1)
    worse = measured(Detection(2), [right, wrong], [right, none])
    assert worse.map == pytest.approx(0.5) and worse.scores.tolist() == [1, 0]
    assert measured(Detection(2), [none, none], [right, none]).map == 0
    with pytest.raises(UserError, match="no image has an object; mAP is not defined"):
        measured(Detection(2), [right, none], [none, none])
    with pytest.raises(UserError, match="the batches hold no samples"):
        Detection(2).meter().compute()


@pytest.mark.parametrize(("kind", "first"), [("FCOS", 0), ("FasterRCNN", 1), ("SSD", 1)])
def test_torchvisions_detectors_get_labels_as_they_count_them(kind: str, first: int) -> None:
    network, task, batch = detector(kind), Detection(2), squares(4)[0]
    shifted = [{**target, "labels": target["labels"] + first} for target in batch[1]]
    torch.manual_seed(1)
    losses = network.train()(list(batch[0]), shifted)
    torch.manual_seed(1)
    loss = task.loss(task.feed(network, batch), batch)
    torch.testing.assert_close(loss, sum(losses.values()))
    assert loss.requires_grad and [target["labels"].tolist() for target in batch[1]] == [
        (target["labels"] - first).tolist() for target in shifted
    ]
    with torch.no_grad():
        theirs = network.eval()(list(batch[0]))
        output = task.feed(network, batch)
    found = task.detections(output, batch)
    assert sum(len(image["labels"]) for image in found)
    for ours, same in zip(found, theirs):
        assert torch.equal(ours["labels"], same["labels"] - first) and torch.equal(ours["boxes"], same["boxes"])


@pytest.mark.parametrize(("background", "first"), [(True, 1), (False, 0)])
def test_background_may_be_told(background: bool, first: int) -> None:
    network, batch = detector("FCOS"), squares(4)[0]
    task, plain = Detection(2, background=background), Detection(3)
    moved = [{**target, "labels": target["labels"] + first} for target in batch[1]]
    network.train()
    torch.testing.assert_close(
        task.loss(task.feed(network, batch), batch), plain.loss(plain.feed(network, (batch[0], moved)), batch)
    )
    boxes, labels = torch.tensor([[0.0, 0, 9, 9]] * 3), torch.tensor([0, 1, 2])
    image = {"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9, 0.8, 0.7])}
    assert task.detections([image], None)[0]["labels"].tolist() == ([0, 1] if background else [0, 1, 2])


def test_a_network_may_call_its_classes_by_numbers_of_its_own() -> None:
    network, task, batch = detector("FCOS", 91), Detection(2), squares(4)[0]
    network.class_labels = (17, 44)  # type: ignore[assignment]
    theirs = [{**target, "labels": torch.tensor([17, 44])[target["labels"]]} for target in batch[1]]
    network.train()
    torch.testing.assert_close(
        task.loss(task.feed(network, batch), batch), sum(network(list(batch[0]), theirs).values())
    )
    boxes, scores = torch.rand(4, 4), torch.tensor([0.9, 0.8, 0.7, 0.6])
    (image,) = task.detections([{"boxes": boxes, "labels": torch.tensor([44, 1, 17, 90]), "scores": scores}], None)
    assert image["labels"].tolist() == [1, 0] and torch.equal(image["boxes"], boxes[[0, 2]])
    assert torch.equal(image["scores"], scores[[0, 2]])


def test_a_small_detector_learns_where_the_squares_are() -> None:
    network, task, test = detector("SSD"), Detection(2), squares(8, seed=1)
    untrained = evaluate(network, test, task=task).map
    data = squares(40, least=0)
    history = train(network, data, 10, lr=3e-3, optimizer="adamw", schedule="one_cycle", task=task)
    assert history[-1].loss < history[0].loss
    trained = evaluate(network, test, task=task)
    assert untrained < 0.05 < 0.5 < trained.map


class Grid(nn.Module):
    """Of each image the box of its brightest cell, as numbers: x, y, red or green. Takes images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def decoded(output: Tensor, batch: Any) -> list[dict[str, Tensor]]:
    found = []
    for image in output:
        place = int(image.argmax())
        label, top, left = place // 49, 8 * (place % 49 // 7), 8 * (place % 7)
        boxes = torch.tensor([[left, top, left + 16, top + 16]]).float()
        found.append({"boxes": boxes, "labels": torch.tensor([label]), "scores": torch.tensor([0.9])})
    return found


def own_loss(output: Tensor, batch: Any) -> Tensor:
    wanted = []
    for target in batch[1]:
        left, top = (target["boxes"][0, :2] / 8).long().tolist()
        wanted.append(49 * int(target["labels"]) + 7 * top + left)
    return nn.functional.cross_entropy(output.flatten(1), torch.tensor(wanted))


def test_a_network_that_takes_images_alone_is_served_by_functions_of_the_users() -> None:
    task = Detection(2, decode_fn=decoded, loss_fn=own_loss)
    network, data = Grid(), squares(16)
    before = evaluate(network, data, task=task)
    history = train(network, data, 30, lr=0.03, optimizer="adamw", task=task)
    assert history[-1].loss < history[0].loss / 2
    after = evaluate(network, data, task=task)
    assert after.map > 0.9 > before.map and after.scores.mean() > 0.9
    task.check_output(network(data[0][0]), 4)
    assert task.compared(network(data[0][0])).shape == (4, 2, 7, 7)
    with pytest.raises(UserError, match=r"returns a tensor \[4, 2, 7, 7\]; detection expects a dict of losses"):
        Detection(2, decode_fn=decoded).loss(network(data[0][0]), data[0])


ONE = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([1])}
TARGETS = [
    (torch.zeros(1, 5), r"targets of a batch are a tensor \[1, 5\]; detection expects a list of dicts"),
    ([{"boxes": torch.zeros(1, 4)}], "a list; detection expects a list of dicts with boxes and labels"),
    ([ONE, ONE], "one an image"),
    (ONE, "a dict with boxes, labels; detection expects"),
    ([{**ONE, "labels": torch.tensor([2])}], "objects of a batch have classes from 2 to 2; expected 0 to 1"),
    ([{**ONE, "labels": torch.tensor([-1])}], "objects of a batch have classes from -1 to -1; expected 0 to 1"),
]


@pytest.mark.parametrize(("targets", "message"), TARGETS)
@pytest.mark.parametrize("labels", [None, (17, 44)], ids=["from 0", "of its own"])
def test_targets_that_do_not_fit_are_told(targets: Any, message: str, labels: Any) -> None:
    network, batch = detector("FCOS", 91), (torch.rand(1, 3, SIZE, SIZE), targets)
    if labels is not None:
        network.class_labels = labels  # type: ignore[assignment]
    task = Detection(2 if labels is None else None)
    with pytest.raises(UserError, match=message):
        task.feed(network.train(), batch)
    with pytest.raises(UserError, match=message):
        evaluate(network, [batch], task=task)


def test_outputs_of_another_form_are_told() -> None:
    task, batch = Detection(2), (torch.zeros(1, 3, 8, 8), [ONE])
    for output, message in (
        (torch.zeros(1, 6), r"a tensor \[1, 6\]; detection expects a dict of losses.*loss_fn"),
        ({}, "a dict with ; detection expects a dict of losses"),
        ({"loss": 1.0}, "a dict with loss; detection expects a dict of losses"),
        ({"loss": torch.zeros(2)}, "a dict with loss"),
    ):
        with pytest.raises(UserError, match=message):
            task.loss(output, batch)
    for found, message in (
        (torch.zeros(1, 6), r"returns a tensor \[1, 6\]; detection expects a list of dicts with boxes, labels, scores"),
        ([ONE], "a list; detection expects a list of dicts.*decode_fn"),
        ({"boxes": torch.zeros(1, 4)}, "a dict with boxes; detection"),
    ):
        with pytest.raises(UserError, match=message):
            task.meter().update(found, batch)
        with pytest.raises(UserError, match=message):
            task.check_output(found, 1)
    with pytest.raises(UserError, match="gives detections of 1 images for 2 of them"):
        task.check_output([{**ONE, "scores": torch.ones(1)}], 2)
    with pytest.raises(UserError, match="expected detections, or a tensor"):
        task.compared([])


def test_what_is_compared_number_by_number_are_boxes_and_scores() -> None:
    images = [
        {**ONE, "scores": torch.ones(1)},
        {key: value[:0] for key, value in {**ONE, "scores": torch.ones(1)}.items()},
    ]
    assert Detection(2).compared(images).tolist() == [[0, 0, 9, 9, 1]]
    assert Detection(2).compared(images[1:]).shape == (0, 5)


def test_labels_of_a_data_set_are_checked_and_there_is_nothing_to_smooth() -> None:
    task = Detection(2)
    task.check_labels({"train": (0, 1), "test": (1, 1)})
    for ranges, message in (
        ({"train": (0, 1)}, "the test images have no objects"),
        ({"test": (0, 1)}, "the train images have no objects"),
        ({"train": (0, 2), "test": (0, 1)}, r"train objects have classes from 0 to 2; expected 0 to 1 .*num_classes=2"),
        ({"train": (0, 1), "test": (-1, 1)}, "test objects have classes from -1 to 1; expected 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            task.check_labels(ranges)
    Detection().check_labels({"train": (0, 90), "test": (0, 3)})
    with pytest.raises(UserError, match="label_smoothing=0.1, but this task has no labels to smooth"):
        task.loss({"loss": torch.zeros(())}, (torch.zeros(1), [ONE]), 0.1)
