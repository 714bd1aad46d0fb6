"""Calibration: activation ranges of a simulation are fitted to data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bnre_exp.algorithms.feeding import ForwardFn, device_of, evaluation_mode, feed, take_batches
from bnre_exp.progress import Progress, no_progress
from bnre_exp.quantsim.quantizers.quantizer import RangeObserver
from bnre_exp.quantsim.sim import activation_quantizers, sim_report


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
    Batches as for :func:`~bnre_exp.reestimate_bn_stats`. Raises ``UserError`` if an activation is not finite; the
    ranges are then as before.
    """
    scheme = sim_report(sim).scheme
    quantizers = list(activation_quantizers(sim).values())
    if not quantizers:
        return
    device = device_of(sim)
    for quantizer in quantizers:
        quantizer.observer = RangeObserver(num_batches)
    try:
        with evaluation_mode(sim):
            for batch in progress(take_batches(dataloader, num_batches), "calibrate", num_batches):
                feed(sim, batch, device, forward_fn)
        fitted = [q.observer.fit(q, scheme.act_range, scheme.percentile) for q in quantizers if q.observer is not None]
        for quantizer, (low, high) in zip(quantizers, fitted):
            quantizer.set_range(low, high)
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
