"""Regression of images: denoising, super-resolution, depth. Or of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnre_exp.errors import UserError
from bnre_exp.tasks.logits import wide
from bnre_exp.tasks.task import Evaluation, Headline, PairTask, TargetFn, first_tensor, refuse_smoothing

HEADLINES = {
    "psnr": Headline("psnr", "PSNR [dB]"),
    "ssim": Headline("ssim", "SSIM"),
    "mae": Headline("mae", "mean absolute error", higher_is_better=False),
}
LOSSES: dict[str, Any] = {"l1": F.l1_loss, "mse": F.mse_loss, "huber": F.huber_loss}
SMALLEST_SIDE = 11  # [pixels] of the window of SSIM
STEPS = 255  # two predictions that are no further apart than one of so many steps of the range agree


class Regression(PairTask):
    """A :class:`~bnre_exp.tasks.task.Task`: batches ``(input, target)``, target ``[N, ...]`` floating point, of the
    shape of the network's output (the first tensor of it).

    data_range: largest minus smallest value that a target can have, in its unit. metric: the headline, "psnr", "ssim"
    or "mae". loss: "l1", "mse" or "huber". target_fn: returns the target in a batch of another form.

    Metrics, each the mean over samples, by torchmetrics: ``mae``, the mean absolute error, in the target's unit; of
    images ``[N, C, H, W]`` also ``psnr``, the peak signal-to-noise ratio [dB] (100 where nothing differs), and of
    sides of at least 11 pixels ``ssim``, structural similarity. ``loss``: of training. A prediction is the output, in
    float32; its score is the headline (mae: negative). Two predictions agree where they differ nowhere by more than
    1/255 of the range.
    """

    targets = "image"

    def __init__(
        self, data_range: float = 1.0, metric: str = "psnr", loss: str = "l1", target_fn: TargetFn | None = None
    ) -> None:
        super().__init__(target_fn)
        if not isinstance(data_range, (int, float)) or not 0 < data_range < float("inf"):
            raise UserError(f"task: data_range={data_range!r}; expected a number above 0, such as 1.0 or 255.")
        for name, value, known in (("metric", metric, HEADLINES), ("loss", loss, LOSSES)):
            if value not in known:
                raise UserError(f"task: {name}={value!r}; expected one of {', '.join(known)}.")
        self.data_range, self.headline, self.loss_name = float(data_range), HEADLINES[metric], loss

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        refuse_smoothing(label_smoothing)
        loss: Tensor = LOSSES[self.loss_name](*self.output_and_target(output, batch))
        return loss

    def output_and_target(self, output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Both in floating point. Raises ``UserError`` where their shapes differ."""
        given, target = wide(self.compared(output)), self.labels(batch)
        if not isinstance(target, Tensor) or target.is_complex() or target.shape != given.shape:
            got = f"{target.dtype} {list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
            raise UserError(
                f"The targets of a batch are {got.removeprefix('torch.')}, and the network gives {list(given.shape)}; "
                "regression expects the same shape of both. If they are elsewhere in the batch, target_fn(batch) "
                "returns them."
            )
        return given, target.to(given)

    def meter(self) -> _Meter:
        return _Meter(self)

    def agreement(self, first: Tensor, second: Tensor) -> float:
        furthest = (first - second).abs().flatten(1).amax(1)
        return float((furthest <= self.data_range / STEPS).double().mean())

    def check_output(self, output: Any, samples: int) -> None:
        given = first_tensor(output)
        if given is None or not given.ndim or len(given) != samples or not given.is_floating_point():
            got = "nothing of tensor type" if given is None else f"{given.dtype} {list(given.shape)}"
            raise UserError(f"model: the network gives {got}; regression expects numbers [{samples}, ...].")
        self.check_metric(list(given.shape))

    def check_metric(self, shape: Sequence[int]) -> None:
        """Raise ``UserError`` where outputs of a shape have no such metric."""
        name = self.headline.name
        if (name != "mae" and len(shape) != 4) or (name == "ssim" and min(shape[2:]) < SMALLEST_SIDE):
            raise UserError(
                f"task: metric={name}, but the network gives {list(shape)}: PSNR is that of images [N, C, H, W], SSIM "
                f"of such of at least {SMALLEST_SIDE} pixels a side. Set metric=mae."
            )

    def check_labels(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        """Any number is a target."""


class _Meter:
    def __init__(self, task: Regression) -> None:
        self._task = task
        self._losses, self._predictions = list[Tensor](), list[Tensor]()
        self._values: dict[str, list[Tensor]] = {}

    def update(self, output: Any, batch: Any) -> None:
        given, target = self._task.output_and_target(output, batch)
        self._losses.append(self._task.loss(output, batch).double() * len(given))
        self._predictions.append(given.float().cpu())
        for name, values in _per_sample(given, target, self._task.data_range).items():
            self._values.setdefault(name, []).append(values.double().cpu())

    def compute(self) -> Evaluation:
        headline = self._task.headline
        if len({tuple(p.shape[1:]) for p in self._predictions}) > 1:
            raise UserError("evaluate: outputs of several sizes; regression is measured on samples of one size.")
        self._task.check_metric(self._predictions[0].shape)
        values = {name: torch.cat(found) for name, found in self._values.items()}
        count = len(values[headline.name])
        if not count:
            raise UserError("evaluate: the batches hold no samples.")
        metrics = {name: float(found.mean()) for name, found in values.items()}
        metrics["loss"] = float(torch.stack(self._losses).sum()) / count
        scores = values[headline.name].float() * (1 if headline.higher_is_better else -1)
        return Evaluation(metrics, headline, count, torch.cat(self._predictions), scores)


def _per_sample(given: Tensor, target: Tensor, data_range: float) -> dict[str, Tensor]:
    """Each metric that is one of such data, ``[N]``."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    found = {"mae": (given - target).abs().flatten(1).mean(1)}
    if given.ndim == 4:
        psnr = peak_signal_noise_ratio(given, target, data_range, reduction="none", dim=(1, 2, 3))
        found["psnr"] = psnr.clamp(max=100.0)
        if min(given.shape[2:]) >= SMALLEST_SIDE:
            found["ssim"] = structural_similarity_index_measure(
                given, target, data_range=data_range, reduction="none"
            ).reshape(-1)  # type: ignore[union-attr]
    return found
