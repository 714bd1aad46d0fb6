"""Keypoints: metrics beside plain numpy, peaks of heatmaps, points that are not seen, and a network that learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnre_exp import UserError, evaluate, train
from bnre_exp.data import digit_scenes
from bnre_exp.tasks import Keypoints
from tests.tasks.scenes import batches

WIDTH, HEIGHT = 48, 32


def examples(n: int = 7, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images, what a network tells ``[N, 2K]``, and keypoints ``[N, K, 3]``, of which some are not seen; none of the
    third image's are."""
    sides = torch.tensor([WIDTH, HEIGHT])
    places = torch.rand(n, k, 2) * sides
    seen = (torch.rand(n, k, 1) < 0.7).float() * torch.tensor([1.0, 2.0, 1.0])[:k, None]
    seen[2] = 0
    told = (places + 3 * torch.randn(n, k, 2)) / sides
    return torch.rand(n, 1, HEIGHT, WIDTH), told.flatten(1), torch.cat([places, seen], 2)


def measured(task: Keypoints, images: Tensor, output: Tensor, points: Tensor, split: int = 3) -> Any:
    meter = task.meter()
    for some in zip(images.split(split), output.split(split), points.split(split)):
        meter.update(some[1], (some[0], some[2]))
    return meter.compute()


@pytest.mark.parametrize(("reference", "threshold"), [("box", 0.1), ("box", 0.2), ("image", 0.05), ("image", 0.1)])
def test_metrics_are_those_of_numpy(reference: str, threshold: float) -> None:
    images, output, points = examples()
    right, seen, distances, errors, scores = 0, 0, [], [], []
    for told, known in zip(output.reshape(7, 3, 2).double().numpy(), points.double().numpy()):
        there = known[:, 2] > 0
        mine = []
        for place, (x, y, _) in zip(told[there], known[there]):
            side = max(WIDTH, HEIGHT) if reference == "image" else np.ptp(known[there, :2], axis=0).max()
            distances.append(np.hypot(place[0] * WIDTH - x, place[1] * HEIGHT - y))
            errors.append((abs(place[0] - x / WIDTH) + abs(place[1] - y / HEIGHT)) / 2)
            mine.append(distances[-1] <= threshold * side)
        right, seen = right + sum(mine), seen + len(mine)
        scores.append(np.mean(mine) if mine else 1.0)
    found = measured(Keypoints(3, threshold, reference), images, output, points)
    assert found.pck == found.value == pytest.approx(right / seen, abs=1e-6) and 0 < found.pck < 1
    assert found.distance == pytest.approx(np.mean(distances), rel=1e-5)
    assert found.loss == pytest.approx(np.mean(errors), rel=1e-5)
    assert found.scores.tolist() == pytest.approx(scores) and found.scores[2] == 1
    assert found.count == 7 and torch.equal(found.predictions, output.reshape(7, 3, 2))


@pytest.mark.parametrize("split", [1, 2, 7])
def test_metrics_do_not_depend_on_the_batches(split: int) -> None:
    images, output, points = examples()
    expected = measured(Keypoints(), images, output, points, 3).metrics
    assert measured(Keypoints(), images, output, points, split).metrics == pytest.approx(expected, rel=1e-6)
    heatmaps = torch.rand(7, 3, 8, 12)
    expected = measured(Keypoints(), images, heatmaps, points, 3).metrics
    assert measured(Keypoints(), images, heatmaps, points, split).metrics == pytest.approx(expected, rel=1e-6)


def test_points_without_a_third_number_are_all_seen_and_coordinates_may_be_points() -> None:
    images, output, points = examples()
    points[..., 2] = 1
    expected = measured(Keypoints(), images, output, points)
    assert measured(Keypoints(), images, output, points[..., :2]).metrics == expected.metrics
    found = measured(Keypoints(), images, output.reshape(7, 3, 2), points)
    assert found.metrics == expected.metrics and torch.equal(found.predictions, expected.predictions)


def test_points_that_are_not_seen_teach_nothing_and_count_for_nothing() -> None:
    images, output, points = examples()
    moved = points.clone()
    moved[..., :2] += 1000 * (points[..., 2:] == 0)
    for given in (output, torch.rand(7, 3, 8, 12)):
        given.requires_grad_()
        task = Keypoints()
        assert torch.equal(task.loss(given, (images, points)), task.loss(given, (images, moved)))
        assert measured(task, images, given.detach(), points).metrics == pytest.approx(
            measured(task, images, given.detach(), moved).metrics
        )
        (slope,) = torch.autograd.grad(task.loss(given, (images, points)), given)
        is_taught = slope.reshape(7, 3, -1).abs().sum(2) > 0
        assert torch.equal(is_taught, points[..., 2] > 0)
        unseen = torch.zeros_like(points)
        assert float(task.loss(given, (images, unseen)).detach()) == 0
        with pytest.raises(UserError, match="no keypoint that is seen"):
            measured(task, images, given.detach(), unseen)


def test_the_loss_of_heatmaps_is_that_of_gaussians_at_the_points() -> None:
    images, heatmaps = torch.zeros(1, 1, HEIGHT, WIDTH), torch.rand(1, 2, 8, 12)  # a cell is 4 pixels
    points = torch.tensor([[[10.0, 2.0], [31.0, 29.0]]])
    errors = []
    for point, heatmap in zip(points[0].numpy() / 4, heatmaps[0].numpy()):
        rows, columns = np.mgrid[:8, :12] + 0.5
        wanted = np.exp(-((columns - point[0]) ** 2 + (rows - point[1]) ** 2) / (2 * 0.8**2))
        errors.append(((heatmap - wanted) ** 2).mean())
    loss = Keypoints(sigma=0.8).loss(heatmaps, (images, points))
    assert float(loss) == pytest.approx(np.mean(errors), rel=1e-5)
    assert measured(Keypoints(sigma=0.8), images, heatmaps, points).loss == pytest.approx(float(loss))


def test_a_heatmap_as_it_is_taught_has_its_peak_at_the_point() -> None:
    """To a half of a cell, and where the cell has neighbours to both sides to a quarter."""
    cells = torch.stack(torch.meshgrid(torch.linspace(0, 12, 49), torch.linspace(0, 8, 33), indexing="xy"), -1)
    points = cells.reshape(-1, 1, 2) * 0.999 + 0.004
    rows, columns = torch.arange(8) + 0.5, torch.arange(12) + 0.5
    across, down = (columns - points[..., :1]).square(), (rows - points[..., 1:]).square()
    heatmaps = torch.exp(-0.5 * (down[..., None] + across[..., None, :]) / 1.5**2)
    images = torch.zeros(len(points), 1, HEIGHT, WIDTH)
    found = Keypoints().points(heatmaps, (images, 4 * points)) * torch.tensor([12.0, 8.0])
    off = (found - points).abs()
    inside = (points > 1) & (points < torch.tensor([11.0, 7.0]))
    assert float(off.max()) <= 0.51 and float(off[inside].max()) <= 0.26
    assert float(off[inside].mean()) < 0.14


@pytest.mark.parametrize(
    ("row", "column", "neighbour", "expected"),
    [
        (3, 5, None, (5.5, 3.5)),
        (3, 5, (3, 6), (5.75, 3.5)),
        (3, 5, (3, 4), (5.25, 3.5)),
        (3, 5, (4, 5), (5.5, 3.75)),
        (3, 5, (2, 5), (5.5, 3.25)),
        (0, 0, None, (0.5, 0.5)),
        (0, 0, (0, 1), (0.5, 0.5)),
        (7, 11, (7, 10), (11.5, 7.5)),
        (0, 11, (1, 11), (11.5, 0.5)),
        (7, 4, (7, 5), (4.75, 7.5)),
        (2, 0, (3, 0), (0.5, 2.75)),
    ],
)
@pytest.mark.parametrize("level", [0.0, -5.0])
def test_peaks(
    row: int, column: int, neighbour: tuple[int, int] | None, expected: tuple[float, float], level: float
) -> None:
    heatmap = torch.full((2, 3, 8, 12), level)
    heatmap[1, 2, row, column] = level + 1
    if neighbour is not None:
        heatmap[1, 2][neighbour] = level + 0.5
    found = Keypoints().points(heatmap, (torch.zeros(2, 1, HEIGHT, WIDTH), torch.zeros(2, 3, 2)))
    assert found.shape == (2, 3, 2)
    assert (found[1, 2] * torch.tensor([12, 8])).tolist() == pytest.approx(expected)


def test_a_single_point_has_no_box_to_be_measured_by() -> None:
    images, points = torch.zeros(2, 1, HEIGHT, WIDTH), torch.tensor([[[9.0, 9.0, 1]], [[20.0, 9.0, 1]]])
    output = points[:, 0, :2] / torch.tensor([WIDTH, HEIGHT])
    with pytest.raises(UserError, match="no box to measure by; set reference=image"):
        measured(Keypoints(1), images, output, points)
    assert measured(Keypoints(1, reference="image"), images, output, points).pck == 1


def test_predictions_agree_where_no_number_differs_by_more_than_a_hundredth() -> None:
    first = torch.full((4, 3, 2), 0.5)
    second = first.clone()
    second[1, 2, 0] += 0.009
    second[2, 0, 1] += 0.011
    assert Keypoints().agreement(first, second) == 0.75 and Keypoints().agreement(first, first) == 1


def test_batches_of_another_form_have_their_keypoints_where_target_fn_says() -> None:
    images, output, points = examples()
    task = Keypoints(target_fn=lambda batch: batch[2])
    assert float(task.loss(output, (images, None, points))) == float(Keypoints().loss(output, (images, points)))
    assert task.samples((images, None, points)) == 7


@pytest.mark.parametrize(
    ("output", "points", "message"),
    [
        (torch.zeros(2, 6), [1, 2], "targets of a batch are list; expected keypoints"),
        (torch.zeros(2, 6), torch.zeros(2, 6), r"targets of a batch are \[2, 6\]; expected keypoints \[N, K, 2\]"),
        (torch.zeros(2, 6), torch.zeros(2, 3, 4), r"are \[2, 3, 4\]"),
        (
            torch.zeros(2, 5),
            torch.zeros(2, 3, 2),
            r"gives \[2, 5\] for keypoints \[2, 3, 2\]; expected heatmaps \[N, 3",
        ),
        (torch.zeros(2, 8), torch.zeros(2, 3, 3), r"gives \[2, 8\] for.*or coordinates \[N, 6\]"),
        (torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 3), r"gives \[2, 4, 8, 8\]"),
        (torch.zeros(2, 3, 3), torch.zeros(2, 3, 3), r"gives \[2, 3, 3\]"),
        (torch.zeros(3, 6), torch.zeros(2, 3, 3), r"gives \[3, 6\]"),
        ({"note": "x"}, torch.zeros(2, 3, 3), "The network returns dict; expected heatmaps"),
    ],
)
def test_what_does_not_fit_is_told(output: Any, points: Any, message: str) -> None:
    task, batch = Keypoints(), (torch.zeros(2, 1, 8, 8), points)
    for call in (lambda: task.loss(output, batch), lambda: task.meter().update(output, batch)):
        with pytest.raises(UserError, match=message):
            call()


def test_settings_and_checks() -> None:
    for settings, message in (
        ({"threshold": 0}, "threshold=0; expected a number above 0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"sigma": "2"}, "sigma='2'"),
        ({"reference": "head"}, "reference='head'; expected one of box, image"),
    ):
        with pytest.raises(UserError, match=message):
            Keypoints(**settings)
    images, output, points = examples()
    with pytest.raises(UserError, match="label_smoothing=0.1, but this task has no labels"):
        Keypoints().loss(output, (images, points), 0.1)
    with pytest.raises(UserError, match="no keypoint that is seen"):
        Keypoints().meter().compute()
    for fits in (torch.zeros(2, 6), torch.zeros(2, 3, 2), torch.zeros(2, 3, 8, 8), [torch.zeros(2, 6), None]):
        Keypoints(3).check_output(fits, 2)
        Keypoints().check_output(fits, 2)
    for odd in (torch.zeros(2, 8), torch.zeros(2, 3, 3), torch.zeros(3, 6), torch.zeros(2, 6).long(), torch.zeros(2)):
        with pytest.raises(UserError, match=r"expected heatmaps \[2, 3, h, w\] or coordinates \[2, 6\]"):
            Keypoints(3).check_output(odd, 2)
    with pytest.raises(UserError, match=r"gives \[2, 5\]; expected heatmaps \[2, K, h, w\] or coordinates \[2, 2K\]"):
        Keypoints().check_output(torch.zeros(2, 5), 2)
    with pytest.raises(UserError, match="gives nothing of tensor type"):
        Keypoints().check_output({}, 2)


def ends_of_digits(train_: bool, count: int, size: int = 32) -> tuple[Tensor, Tensor]:
    scenes = digit_scenes(train_, targets="keypoints", size=size, count=count)
    items = [scenes[i] for i in range(count)]
    return torch.stack([image for image, _ in items]).float() / 255, torch.stack([points for _, points in items])


def block(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()]


def heatmaps() -> nn.Module:
    """Of half of the image's sides."""
    return nn.Sequential(*block(1, 16, 3, 2), *block(16, 24, 5), *block(24, 24, 5), nn.Conv2d(24, 4, 1))


def coordinates() -> nn.Module:
    return nn.Sequential(*block(1, 16, 3, 2), *block(16, 16, 3, 2), nn.Flatten(), nn.Linear(1024, 8), nn.Sigmoid())


@pytest.mark.parametrize(("make", "least"), [(heatmaps, 0.4), (coordinates, 0.2)])
def test_a_small_network_learns_where_digits_end(make: Any, least: float) -> None:
    torch.manual_seed(0)
    network, task = make(), Keypoints(4, threshold=0.2, sigma=1.0)
    data, test = batches(*ends_of_digits(True, 144), 16), batches(*ends_of_digits(False, 64))
    task.check_output(network(test[0][0]), 32)
    before = evaluate(network, test, task=task)
    history = train(network, data, 8, lr=0.01, optimizer="adamw", schedule="one_cycle", task=task)
    after = evaluate(network, test, task=task)
    assert history[-1].loss < history[0].loss / 2 and after.loss < before.loss
    assert before.pck < 0.15 and after.pck > least and after.distance < before.distance / 2
