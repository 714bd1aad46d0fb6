"""How seconds grow with the number of batches, with channels and with depth: bnre_exp beside the FP32 network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from bnre_exp import QuantScheme, calibrate, quantize, reestimate_bn_stats
from scripts.bench.speed.case import QAT, REESTIMATE, Case, a_call, many
from scripts.bench.speed.contenders import Variant, forward_plainly, fp32, ours
from scripts.bench.speed.measure import Make, Rounds, timings

BATCHES = (1, 2, 5, 10, 20, 40)
WIDTHS = (0.25, 0.5, 1.0, 1.5, 2.0)
DEPTHS = ("resnet18", "resnet34", "resnet50")
NETWORK = "mobilenet_v2"


def series(case: Case, rounds: Rounds) -> Iterator[dict[str, Any]]:
    """Rows as of timings, with ``along`` (batches, channels, depth) and ``at``, the place on that axis."""
    for count in BATCHES:
        of_count = replace(case, network=NETWORK)
        makes: dict[str, Make] = {"FP32": partial(_forward, count=count), "ours": partial(_reestimate, count=count)}
        yield from _at("batches", count, of_count, makes, rounds)
    both: dict[str, Make] = {
        name: partial(_batches_of, make=make) for name, make in {"FP32": fp32, "ours": ours}.items()
    }
    for width in WIDTHS:
        yield from _at("channels", width, replace(case, network=f"{NETWORK}*{width}"), both, rounds)
    for network in DEPTHS:
        yield from _at("depth", network, replace(case, network=network), both, rounds)


def _at(along: str, at: Any, case: Case, makes: dict[str, Make], rounds: Rounds) -> Iterator[dict[str, Any]]:
    for row in timings(case, makes, rounds):
        yield {"along": along, "at": at, "network": case.network, "size": case.size, "batch": case.batch, **row}


def _batches_of(case: Case, make: Any) -> Any:
    return {name: step for name, step in make(case, Variant()).items() if name in (QAT, REESTIMATE)}


def _forward(case: Case, count: int) -> Any:
    """Whole, as the re-estimation beside it is: what is done once a call counts here."""
    model, images = case.network_of().train(), many(case.images(), count)
    return {REESTIMATE: a_call(partial(forward_plainly, model, images), case)}


def _reestimate(case: Case, count: int) -> Any:
    images = case.images()
    sim = quantize(case.network_of(), images[0], QuantScheme(case.weight_bits, case.act_bits))
    calibrate(sim, images, 1)
    return {REESTIMATE: a_call(partial(reestimate_bn_stats, sim, many(images, count), count), case)}
