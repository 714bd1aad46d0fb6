"""Keypoints: where the parts of one object are in its image; told by heatmaps, or by coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnre_exp.errors import UserError
from bnre_exp.tasks.logits import wide
from bnre_exp.tasks.task import Evaluation, Headline, PairTask, TargetFn, first_input, first_tensor, refuse_smoothing

PCK = Headline("pck", "PCK")
REFERENCES = ("box", "image")
STEPS = 100  # two predictions that differ by no more than one of so many parts of the image's sides agree


class Keypoints(PairTask):
    """A :class:`~bnre_exp.tasks.task.Task`: batches ``(images [N, C, H, W], keypoints [N, K, 2 or 3])``, x and y
    [pixels], and whether the point is seen (above 0; without it, all are).

    The first tensor of the network's output is heatmaps ``[N, K, h, w]`` that cover the image, or coordinates
    ``[N, 2K]`` or ``[N, K, 2]`` (x and y, as parts of the image's width and height). num_keypoints: K, None: any.
    threshold, reference: a point is right if it is no further off than ``threshold`` times the larger side of the box
    around the image's seen keypoints ("box"), or of the image ("image"). sigma: of the Gaussians that heatmaps are
    taught [cells of the heatmap]. target_fn: returns the keypoints in a batch of another form.

    The loss is the mean squared error of heatmaps, or the mean absolute error of coordinates, of seen points. Metrics:
    ``pck``, the fraction of seen keypoints that are right (Yang and Ramanan, 2013), ``distance``, the mean distance of
    seen points [pixels], and ``loss``. A prediction is ``[K, 2]``, as parts of the image's width and height; its score
    is the fraction of the image's seen points that are right, 1 where none is seen. Two predictions agree where no
    number differs by more than a hundredth.
    """

    headline = PCK
    OUTPUT = "heatmaps [N, K, h, w] or coordinates [N, 2K]"
    targets = "keypoints"

    def __init__(
        self, num_keypoints: int | None = None, threshold: float = 0.1, reference: str = "box", sigma: float = 1.5,
        target_fn: TargetFn | None = None,
    ) -> None:  # fmt: skip
        super().__init__(target_fn)
        for name, value in (("threshold", threshold), ("sigma", sigma)):
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise UserError(f"task: {name}={value!r}; expected a number above 0.")
        if reference not in REFERENCES:
            raise UserError(f"task: reference={reference!r}; expected one of {', '.join(REFERENCES)}.")
        self.num_keypoints, self.threshold, self.reference, self.sigma = num_keypoints, threshold, reference, sigma

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        refuse_smoothing(label_smoothing)
        given, points, seen = self.output_and_points(output, batch)
        sides = _sides(batch).to(points)
        if given.ndim == 4:
            cells = torch.tensor([given.shape[3], given.shape[2]]).to(points)
            wrong = (given - _gaussians(points / sides * cells, given.shape[2:], self.sigma)).square().mean((2, 3))
        else:
            wrong = (given - points / sides).abs().mean(2)
        return torch.where(seen, wrong, 0).sum() / seen.sum().clamp(min=1)

    def output_and_points(self, output: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Heatmaps ``[N, K, h, w]`` or coordinates ``[N, K, 2]``; the keypoints ``[N, K, 2]`` and whether each is seen
        ``[N, K]``. Raises ``UserError`` where they do not fit each other."""
        given, known = wide(self.compared(output)), self.labels(batch)
        if not isinstance(known, Tensor) or known.ndim != 3 or known.shape[2] not in (2, 3):
            got = list(known.shape) if isinstance(known, Tensor) else type(known).__name__
            raise UserError(f"The targets of a batch are {got}; expected keypoints [N, K, 2] or [N, K, 3].")
        known = known.to(given)
        given = given.reshape(len(given), -1, 2) if given.ndim == 2 and given.shape[1] % 2 == 0 else given
        is_output = given.ndim == 4 or (given.ndim == 3 and given.shape[2] == 2)
        if not is_output or given.shape[:2] != known.shape[:2]:
            raise UserError(
                f"The network gives {list(self.compared(output).shape)} for keypoints {list(known.shape)}; expected "
                f"heatmaps [N, {known.shape[1]}, h, w] or coordinates [N, {2 * known.shape[1]}]."
            )
        points = known[..., :2]
        seen = known[..., 2] > 0 if known.shape[2] == 3 else torch.ones_like(points[..., 0], dtype=torch.bool)
        return given, points, seen

    def points(self, output: Any, batch: Any) -> Tensor:
        """Where the network sees each keypoint, ``[N, K, 2]``: x, y, as parts of the image's width and height."""
        given, _, _ = self.output_and_points(output, batch)
        return _peaks(given) if given.ndim == 4 else given

    def meter(self) -> _Meter:
        return _Meter(self)

    def agreement(self, first: Tensor, second: Tensor) -> float:
        return float(((first - second).abs().flatten(1).amax(1) <= 1 / STEPS).double().mean())

    def check_output(self, output: Any, samples: int) -> None:
        given, count = first_tensor(output), self.num_keypoints
        fits = given is not None and given.ndim in (2, 3, 4) and len(given) == samples and given.is_floating_point()
        if given is not None and fits:
            found = given.shape[1] / 2 if given.ndim == 2 else given.shape[1]
            fits = (
                found == int(found) and (count is None or found == count) and (given.ndim != 3 or given.shape[2] == 2)
            )
        if not fits:
            got, names = "nothing of tensor type" if given is None else f"{list(given.shape)}", ("K", "2K")
            points, numbers = names if count is None else (str(count), str(2 * count))
            raise UserError(
                f"model: the network gives {got}; expected heatmaps [{samples}, {points}, h, w] or coordinates "
                f"[{samples}, {numbers}]."
            )
        if self.reference == "box" and given is not None and given.shape[1] == (2 if given.ndim == 2 else 1):
            raise UserError("task: around one keypoint there is no box to measure by; set task.kwargs.reference=image.")

    def check_labels(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        """Keypoints have no classes."""


def _sides(batch: Any) -> Tensor:
    """Width and height of a batch's images [pixels]."""
    images = first_input(batch)
    return torch.tensor([images.shape[-1], images.shape[-2]], dtype=torch.float32)


def _gaussians(points: Tensor, size: tuple[int, int] | torch.Size, sigma: float) -> Tensor:
    """Heatmaps ``[N, K, h, w]`` with a peak of 1 at the points ``[N, K, 2]`` [cells; the middle of the first: 0.5]."""
    rows, columns = (torch.arange(side, device=points.device, dtype=points.dtype) + 0.5 for side in size)
    across = ((columns - points[..., :1]) / sigma).square()
    down = ((rows - points[..., 1:]) / sigma).square()
    return torch.exp(-0.5 * (down.unsqueeze(-1) + across.unsqueeze(-2)))


def _peaks(heatmaps: Tensor) -> Tensor:
    """Where each heatmap ``[N, K, h, w]`` is highest, ``[N, K, 2]``, as parts of its sides; a quarter of a cell nearer
    to the higher neighbour (Newell and others, 2016) where there are two."""
    height, width = heatmaps.shape[2:]
    best = heatmaps.flatten(2).argmax(2)
    sides, cells = torch.tensor([width, height]).to(best), torch.stack([best % width, best // width], dim=-1)
    around = F.pad(heatmaps, (1, 1, 1, 1)).flatten(2)
    middle = (cells[..., 1:] + 1) * (width + 2) + cells[..., :1] + 1
    slopes = [around.gather(2, middle + step) - around.gather(2, middle - step) for step in (1, width + 2)]
    has_both = (cells > 0) & (cells < sides - 1)
    return (cells + 0.5 + 0.25 * torch.cat(slopes, dim=-1).sign() * has_both) / sides


class _Meter:
    def __init__(self, task: Keypoints) -> None:
        self._task = task
        self._losses, self._predictions, self._scores = list[Tensor](), list[Tensor](), list[Tensor]()
        self._right, self._seen, self._distances, self._largest = 0, 0, 0.0, 0.0

    def update(self, output: Any, batch: Any) -> None:
        task = self._task
        _, points, seen = task.output_and_points(output, batch)
        found, sides = task.points(output, batch), _sides(batch).to(points)
        distances = (found * sides - points).norm(dim=2)
        reference, counts = self._reference(points, seen, sides), seen.sum(1)
        right = (distances <= task.threshold * reference[:, None]) & seen
        self._largest = max(self._largest, float(reference.amax()))
        self._right, self._seen = self._right + int(right.sum()), self._seen + int(counts.sum())
        self._distances += float(distances[seen].double().sum())
        self._losses.append(task.loss(output, batch).double() * counts.sum())
        self._scores.append(torch.where(counts > 0, right.sum(1) / counts.clamp(min=1), 1.0).float().cpu())
        self._predictions.append(found.float().cpu())

    def _reference(self, points: Tensor, seen: Tensor, sides: Tensor) -> Tensor:
        """What a distance is measured by, image by image ``[N]`` [pixels]."""
        if self._task.reference == "image":
            return sides.amax().expand(len(points))
        some = seen.unsqueeze(-1)
        high = torch.where(some, points, -torch.inf).amax(1)
        low = torch.where(some, points, torch.inf).amin(1)
        return (high - low).amax(1)

    def compute(self) -> Evaluation:
        scores = torch.cat(self._scores) if self._scores else torch.zeros(0)
        if not self._seen:
            raise UserError("evaluate: the batches hold no keypoint that is seen.")
        if self._largest <= 0:
            raise UserError(
                "evaluate: no image has two keypoints in different places, so that there is no box to measure by; set "
                "reference=image."
            )
        metrics = {"pck": self._right / self._seen, "distance": self._distances / self._seen}
        metrics["loss"] = float(torch.stack(self._losses).sum()) / self._seen
        return Evaluation(metrics, PCK, len(scores), torch.cat(self._predictions), scores)
