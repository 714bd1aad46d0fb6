"""The FP32 network, which is the floor, and bnre_exp: what each does of every step."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import cross_entropy

from bnre_exp import QuantScheme, calibrate, evaluate, fold_batch_norms, quantize, reestimate_bn_stats, train
from scripts.bench.speed.case import (
    CALIBRATE_2,
    CALIBRATE_8,
    EVALUATE,
    FOLD,
    INSERT,
    QAT,
    REESTIMATE,
    Case,
    Step,
    a_batch,
    a_call,
    many,
)

LR, MOMENTUM = 1e-4, 0.9  # SGD with Nesterov's momentum, for every contender
CALIBRATIONS = {CALIBRATE_2: 2, CALIBRATE_8: 8}


@dataclass(frozen=True)
class Variant:
    """How a network is computed."""

    compile: bool = False
    precision: str = "float32"

    def label(self, name: str) -> str:
        compiled = ["compiled"] if self.compile else []
        return ", ".join([name, *compiled, *([self.precision] if self.precision != "float32" else [])])

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any] | None:
        """What bnre_exp's ``function`` is to be told, None where it has no such argument (yet)."""
        told = {"compile": True} if self.compile else {}
        told |= {"precision": self.precision} if self.precision != "float32" else {}
        return told if set(told) <= set(inspect.signature(function).parameters) else None

    def autocast(self, device: str) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(device).type, dtype=getattr(torch, self.precision))


def fp32(case: Case, variant: Variant) -> dict[str, Step]:
    """A plain loop over the float network, in channels-last."""
    model, batches, images = case.network_of(), case.batches(), case.images()
    network = torch.compile(model) if variant.compile else model

    def computed(function: Callable[..., Any], mode: bool) -> Callable[[Any], None]:
        def run(loader: Any) -> None:
            model.train(mode)
            with variant.autocast(case.device):
                function(network, loader)

        return run

    steps = {
        QAT: a_batch(computed(train_plainly, True), case, batches),
        REESTIMATE: a_batch(computed(forward_plainly, True), case, images),
        EVALUATE: a_batch(computed(forward_plainly, False), case, images),
    }
    forward = computed(forward_plainly, False)
    for name, count in CALIBRATIONS.items():
        steps[name] = a_call(functools.partial(forward, many(images, count)), case)
    return steps


def ours(case: Case, variant: Variant) -> dict[str, Step]:
    """bnre_exp's public functions, per-channel weights, activations quantized."""
    batches, images, scheme = case.batches(), case.images(), QuantScheme(case.weight_bits, case.act_bits)
    new, sim = _builders(case, scheme)
    steps = _ours_in(case, variant, sim)
    if variant == Variant():
        for name, count in CALIBRATIONS.items():
            steps[name] = a_call(
                functools.partial(calibrate, dataloader=many(images, count), num_batches=count), case, sim
            )
        steps[INSERT] = a_call(new, case, case.network_of)
        steps[FOLD] = a_call(fold_batch_norms, case, sim)
    arguments = variant.arguments(train)
    if arguments is not None:
        steps[QAT] = a_batch(
            lambda loader: train(
                sim(), loader, 1, lr=LR, optimizer="sgd", momentum=MOMENTUM, schedule="constant", **arguments
            ),
            case,
            batches,
        )
    return steps


def ours_weights_only(case: Case, variant: Variant) -> dict[str, Step]:
    """Re-estimation where activations are float."""
    _, sim = _builders(case, QuantScheme(case.weight_bits, None))
    return {name: step for name, step in _ours_in(case, variant, sim).items() if name == REESTIMATE}


def _builders(
    case: Case, scheme: QuantScheme
) -> tuple[Callable[[nn.Module], fx.GraphModule], Callable[[], fx.GraphModule]]:
    """What makes a simulation of a network, and what makes one, calibrated, the first time and returns it then."""
    images = case.images()

    def new(model: nn.Module) -> fx.GraphModule:
        return quantize(model, images[0], scheme)

    @functools.cache
    def calibrated() -> fx.GraphModule:
        sim = new(case.network_of())
        calibrate(sim, images, 1)
        return sim

    return new, calibrated


def _ours_in(case: Case, variant: Variant, sim: Callable[[], fx.GraphModule]) -> dict[str, Step]:
    """Re-estimation and evaluation, where they take the variant's arguments."""
    steps, batches, images = {}, case.batches(), case.images()
    reestimating, evaluating = variant.arguments(reestimate_bn_stats), variant.arguments(evaluate)
    if reestimating is not None:
        steps[REESTIMATE] = a_batch(
            lambda loader: reestimate_bn_stats(sim(), loader, len(loader), **reestimating), case, images, extra=1
        )
    if evaluating is not None:
        steps[EVALUATE] = a_batch(lambda loader: evaluate(sim(), loader, **evaluating), case, batches)
    return steps


def train_plainly(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> None:
    """SGD on the cross entropy of each batch, in the mode that the model is in."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, momentum=MOMENTUM, nesterov=True, fused=True)
    for images, labels in loader:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def forward_plainly(model: nn.Module, loader: Iterable[Tensor]) -> None:
    for images in loader:
        model(images)


def not_offered(variants: Iterable[Variant]) -> list[str]:
    """A line for each variant that functions of bnre_exp cannot do, whose rows are left out."""
    functions = (train, reestimate_bn_stats, evaluate)
    left_out = {v.label("ours"): [f.__name__ for f in functions if v.arguments(f) is None] for v in variants}
    return [
        f"{name}: left out of {', '.join(those)}, which cannot do that." for name, those in left_out.items() if those
    ]
