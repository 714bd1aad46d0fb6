"""Calibration: activation ranges of a simulation are fitted to data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from bnre_exp.algorithms.feeding import (
    ForwardFn,
    cached_weights,
    check_num_batches,
    device_of,
    evaluation_mode,
    feed,
    take_batches,
)
from bnre_exp.errors import UserError
from bnre_exp.progress import Progress, no_progress
from bnre_exp.quantsim.admission import refuse_inference
from bnre_exp.quantsim.quantizers.observer import Draws, RangeObserver
from bnre_exp.quantsim.sim import CONTAINER, activation_quantizers, sim_report
from bnre_exp.quantsim.usable import unusable_tensors


@torch.no_grad()
def calibrate(
    sim: nn.Module,
    dataloader: Iterable[Any],
    num_batches: int = 8,
    forward_fn: ForwardFn | None = None,
    *,
    progress: Progress = no_progress,
) -> None:
    """Fit the range of every activation quantizer to ``num_batches`` batches; in place, nothing else changes.

    The values observed are those of the network in evaluation mode with quantized weights and float activations.
    Batches as for :func:`~bnre_exp.reestimate_bn_stats`. Raises ``UserError`` naming the tensor and the batch if an
    activation is not finite; the ranges are then as before.
    """
    scheme = sim_report(sim).scheme
    check_num_batches(num_batches)
    quantizers = list(activation_quantizers(sim).values())
    if not quantizers:
        return
    device = device_of(sim)
    for quantizer in quantizers:
        refuse_inference(quantizer.scale, "The activation ranges")
    draws: Draws = {}
    for quantizer in quantizers:
        quantizer.observer = RangeObserver(num_batches, draws=draws)
    try:
        with evaluation_mode(sim), cached_weights(sim, forward_fn):
            batches = progress(take_batches(dataloader, num_batches), "calibrate", num_batches)
            for number, batch in enumerate(batches, start=1):
                feed(sim, batch, device, forward_fn)
                _refuse_not_finite(sim, number)
        fitted = [q.observer.fit(q, scheme.act_range, scheme.percentile) for q in quantizers if q.observer is not None]
        for quantizer, (low, high) in zip(quantizers, fitted):
            quantizer.set_range(low, high)
    finally:
        for quantizer in quantizers:
            quantizer.observer = None


def _refuse_not_finite(sim: nn.Module, number: int) -> None:
    """Raise ``UserError`` naming the first tensor, in order of execution, that is not finite since this batch."""
    quantizers = activation_quantizers(sim).items()
    found = [(name, q.label) for name, q in quantizers if q.observer is not None and not q.observer.is_finite]
    if not found:
        return
    name, label = found[0]
    nodes = sim.graph.nodes if isinstance(sim, fx.GraphModule) else ()
    inputs = {node.name for node in nodes if node.op == "placeholder"}
    if name.removeprefix(f"{CONTAINER}.") in inputs:
        cause = "they come from the data loader as they are"
    else:
        damaged = "; ".join(unusable_tensors(sim)[:3])
        cause = damaged or (
            "look for exploding weights or corrupted BN statistics in the network before it is quantized, or a mask of "
            "-inf, which no grid holds (a finite number, such as -100, masks as well)"
        )
    raise UserError(
        f"The activations of {label} are not finite during calibration, in batch {number} (counted from 1): {cause}. "
        "The ranges are as before."
    )
