"""Weights that oscillate between two integers in quantization-aware training: how many, and two ways to stop them.

Source: Nagel, Fournarakis, Bondarenko and Blankevoort, "Overcoming oscillations in quantization-aware training", ICML
2022. In which order a step is counted, averaged and frozen is that of the authors' code.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError, few
from bnre_exp.quantsim.quantizers.quantizer import WeightQuantizer, positive
from bnre_exp.quantsim.sim import weight_quantizers

METHODS = ("none", "dampening", "freezing")
OSCILLATING = 0.005  # a weight of a higher frequency oscillates
CHUNK = 2**20  # weights at a time: what is computed of them stays in the processor's cache


@dataclass(frozen=True)
class LayerShare:
    """Of a layer: its weights, and which parts of them oscillate and are frozen, in [0, 1]."""

    layer: str
    weights: int
    oscillating: float
    frozen: float


@dataclass(frozen=True)
class _Layer:
    """A quantized weight, and where it begins among all weights."""

    name: str
    quantizer: WeightQuantizer
    weight: nn.Parameter
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """The weight's part of a tensor of all weights, in its shape, and in memory as it is: all that is computed of
        both goes through memory in one order, which is several times as fast."""
        part, weight = flat[self.start : self.start + self.weight.numel()], self.weight
        is_without_gaps = torch.empty_like(weight).stride() == weight.stride()
        return part.as_strided(weight.shape, weight.stride()) if is_without_gaps else part.view(weight.shape)

    def scale(self) -> Tensor:
        return self.quantizer.layout.expand(positive(self.quantizer.scale))


@dataclass(frozen=True)
class Oscillations:
    """Follows the integer weights of a simulation step by step; :func:`~bnre_exp.train` calls it. It changes in place.

    state: of all N weights, ``[N]`` each, layer after layer: ``codes``, the integers after the last step;
    ``direction``, that of each one's last change (-1, 1; 0: never); ``frequency``, the moving average of its
    oscillations. With freezing also ``average``, of the integers, and ``frozen``: whether a weight is held at its entry
    in ``codes`` (0 or 1). Integers are of a type that holds differences of codes.
    """

    method: str
    momentum: float
    dampening: float
    freeze_from: float
    freeze_to: float
    layers: tuple[_Layer, ...] = field(repr=False)
    state: dict[str, Tensor] = field(repr=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state layer by layer, for snapshots: views."""
        return {f"{name}/{layer.name}": layer.of(flat) for name, flat in self.state.items() for layer in self.layers}

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same when a training goes on: of the method in use alone."""
        used = {"dampening": ("dampening",), "freezing": ("freeze_from", "freeze_to")}.get(self.method, ())
        return {"oscillation": self.method, **{name: getattr(self, name) for name in ("momentum", *used)}}

    @property
    def needs_end(self) -> bool:
        """Dampening and freezing follow a cosine over all steps."""
        return self.method != "none"

    @torch.no_grad()
    def before_step(self, progress: float) -> None:
        """Add to the gradients of the loss, in place, what the method adds. progress: of all steps, in (0, 1]."""
        if self.method == "dampening":
            strength = annealed(0.0, self.dampening, progress)
            for layer in self.layers:
                add_gradient(layer.weight, dampening_gradient(layer.quantizer, layer.weight, strength))
        if self.method == "freezing":
            for layer in self.layers:
                _correct_scale_gradient(layer, self.state["codes"], self.state["frozen"])

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Take in the integers that a step of the optimizer left, once, and freeze weights that oscillate too often."""
        now, threshold = torch.empty_like(self.state["codes"]), annealed(self.freeze_from, self.freeze_to, progress)
        for layer in self.layers:
            is_trained = layer.weight.requires_grad
            layer.of(now).copy_(layer.quantizer.codes(layer.weight) if is_trained else layer.of(self.state["codes"]))
        for codes, *own in zip(now.split(CHUNK), *(flat.split(CHUNK) for flat in self.state.values())):
            state = dict(zip(self.state, own))
            if "frozen" in state:
                codes = blend_(codes, state["codes"], state["frozen"])
            follow(codes, state["codes"], state["direction"], state["frequency"], self.momentum)
            state["codes"].copy_(codes)
            if "frozen" in state:
                freeze(state, threshold, self.momentum)
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Put the latent weights of frozen ones at integer times scale, as that now is."""
        for layer in self.layers if "frozen" in self.state else ():
            codes, frozen = (layer.of(self.state[name]).to(layer.weight.dtype) for name in ("codes", "frozen"))
            layer.weight.lerp_((codes * layer.scale()).to(codes.dtype), frozen)  # exactly the one or the other

    def shares(self) -> dict[str, float]:
        """Parts of all weights that oscillate, and with freezing that are frozen, in [0, 1]."""
        rows, total = self.by_layer(), self.state["codes"].numel()
        found = {"oscillating": sum(row.oscillating * row.weights for row in rows) / total}
        if "frozen" in self.state:
            found["frozen"] = sum(row.frozen * row.weights for row in rows) / total
        return found

    def by_layer(self) -> list[LayerShare]:
        """Of each layer, how many of its weights oscillate: more often than with a frequency of 0.005, and they are not
        frozen, as frozen ones stand still while their frequency decays."""
        often = self.state["frequency"] > OSCILLATING
        frozen = self.state["frozen"].bool() if "frozen" in self.state else torch.zeros_like(often)
        often &= ~frozen
        sizes = [layer.weight.numel() for layer in self.layers]
        counts = [torch.stack([part.sum() for part in flags.split(sizes)]).tolist() for flags in (often, frozen)]
        return [
            LayerShare(layer.name, size, moving / size, held / size)
            for layer, size, moving, held in zip(self.layers, sizes, *counts)
        ]


def track_oscillations(
    sim: nn.Module, *, method: str = "none", momentum: float = 0.01, dampening: float = 0.1, freeze_from: float = 0.1,
    freeze_to: float = 0.01,
) -> Oscillations:  # fmt: skip
    """What follows the integer weights of a simulation in training: ``train(sim, ..., oscillations=it)``.

    A weight oscillates in a step when its integer changes, in the direction opposite to its change before. Its
    frequency is the exponential moving average of that (1 or 0) with the weight ``momentum`` for the newest step.
    Afterwards ``by_layer()`` tells which part of a layer's weights has a frequency above 0.005.

    method: "none" counts only. "dampening" adds ``strength * ||w_hat - clip(w)||^2`` to the loss, the sum over all
    quantized weights, where ``clip`` cuts the latent weight w at the range and w_hat is the quantized one; only w has a
    gradient of it. The strength rises from 0 to ``dampening`` by a cosine over all steps. "freezing" holds a weight for
    the rest of the training at the rounded moving average of its integers, once its frequency exceeds a threshold that
    goes from ``freeze_from`` to ``freeze_to`` by a cosine. Its scale is still trained, and it is held in integers.
    Weights that are not trained count as standing still, though a scale that is trained may change their integers.

    The simulation must be where it is trained, and may not be replaced or moved before that. Raises ``UserError`` for a
    simulation without quantized weights, for numbers that make no sense, and for freezing where layers share a weight.
    """
    if method not in METHODS:
        raise UserError(f"method={method!r}: expected one of {', '.join(METHODS)}.")
    _check("momentum", momentum, "more than 0 and at most 1", lambda x: 0 < x <= 1)
    _check("dampening", dampening, "0 or more", lambda x: x >= 0)
    for name, value in (("freeze_from", freeze_from), ("freeze_to", freeze_to)):
        _check(name, value, "0 to 1", lambda x: 0 <= x <= 1)
    quantizers, weights = weight_quantizers(sim), _latent_weights(sim)
    if method == "freezing":
        _refuse_shared(weights)
    starts = accumulate((weight.numel() for weight in weights.values()), initial=0)
    layers = tuple(_Layer(name, quantizers[name], weights[name], start) for name, start in zip(weights, starts))
    return Oscillations(method, momentum, dampening, freeze_from, freeze_to, layers, _state(layers, method))


@torch.no_grad()
def follow(now: Tensor, before: Tensor, direction: Tensor, frequency: Tensor, momentum: float) -> None:
    """Take one step of integer weights into ``direction`` and ``frequency``, in place; all of one shape.

    now, before: integers after this step and the one before, of a type that holds their difference. An oscillation is a
    change against ``direction``, that of the change before.
    """
    change = (now - before).sign_()
    oscillates = (change * direction).clamp_(max=0).neg_()
    frequency.lerp_(oscillates.to(frequency.dtype), momentum)
    direction.mul_(1 - change.abs()).add_(change)


@torch.no_grad()
def freeze(state: Mapping[str, Tensor], threshold: float, momentum: float) -> None:
    """Freeze weights whose frequency exceeds the threshold at the rounded average of their integers of before this
    step, then take this step into the average; in place."""
    codes, average, frozen = state["codes"], state["average"], state["frozen"]
    now = codes.to(average.dtype)
    new = (state["frequency"] > threshold).view(torch.int8) * (1 - frozen)
    blend_(codes, average.round().to(codes.dtype), new)
    frozen.add_(new)
    average.lerp_(now, momentum)


def blend_(values: Tensor, others: Tensor, chosen: Tensor) -> Tensor:
    """In place: ``others`` where ``chosen`` is 1, where it is 0 the integers that are there. (``torch.where`` takes ten
    times as long on a CPU.)"""
    return values.add_((others - values).mul_(chosen))


def dampening_gradient(quantizer: WeightQuantizer, weight: Tensor, strength: float) -> Tensor:
    """The gradient of ``strength * ||w_hat - clip(w)||^2`` by the latent weight, w_hat and the range being constants: a
    weight outside of the range has none, since both are the end of it there."""
    scale = quantizer.layout.expand(positive(quantizer.scale)).to(weight.dtype)
    mirrored = quantizer.layout.expand(quantizer.mirrored).to(weight.dtype)
    low, high = scale * (quantizer.quant_min + mirrored), scale * (quantizer.quant_max + mirrored)
    clipped = torch.minimum(torch.maximum(weight, low), high)
    return (clipped - quantizer.codes(weight) * scale).mul_(2 * strength)


def annealed(start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` by half a cosine; progress: in [0, 1]."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's gradient in place; one that is not trained gets none."""
    if parameter.requires_grad:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _correct_scale_gradient(layer: _Layer, codes: Tensor, frozen: Tensor) -> None:
    """A frozen weight is integer times scale, whose derivative by the scale is the integer. That of a weight which is
    rounded, as LSQ has it, is the distance to its integer, which is zero for a latent weight that is held there."""
    quantizer, grad = layer.quantizer, layer.weight.grad
    if grad is None or quantizer.scale.grad is None:
        return
    rows = quantizer.layout.rows(grad * layer.of(codes) * layer.of(frozen), quantizer.per_channel)
    sign = torch.copysign(torch.ones_like(quantizer.scale), quantizer.scale)
    quantizer.scale.grad.add_(rows.sum(1) * sign * quantizer.gradient_scale(layer.weight))


def _latent_weights(sim: nn.Module) -> dict[str, nn.Parameter]:
    """The float weights behind all weight quantizers, by layer."""
    layers: dict[str, Any] = {name: sim.get_submodule(name) for name in weight_quantizers(sim)}
    weights: dict[str, nn.Parameter] = {name: layer.parametrizations.weight.original for name, layer in layers.items()}
    if not weights:
        raise UserError("track_oscillations: no weights of this network are quantized; expected what quantize() made.")
    return weights


def _refuse_shared(weights: Mapping[str, nn.Parameter]) -> None:
    """Raise ``UserError`` if two layers share a weight: each has a scale of its own, and so an integer of its own."""
    shared = [name for name, weight in weights.items() if sum(weight is other for other in weights.values()) > 1]
    if shared:
        raise UserError(
            f"track_oscillations: {few(shared)} share a weight, which cannot be held at an integer times the scale of "
            "each; expected method='dampening' or 'none', or weights that are not shared."
        )


def _state(layers: Sequence[_Layer], method: str) -> dict[str, Tensor]:
    """What is known of all weights before the first step."""
    largest = 2 * max(-layer.quantizer.quant_min for layer in layers)
    dtype = next(t for t in (torch.int8, torch.int16, torch.int32) if largest <= torch.iinfo(t).max)
    codes = torch.empty(sum(layer.weight.numel() for layer in layers), dtype=dtype, device=layers[0].weight.device)
    for layer in layers:
        layer.of(codes).copy_(layer.quantizer.codes(layer.weight.detach()))
    own = {
        "codes": codes,
        "direction": torch.zeros_like(codes),
        "frequency": torch.zeros_like(codes, dtype=torch.float),
    }
    if method == "freezing":
        own.update(average=codes.float(), frozen=torch.zeros_like(codes, dtype=torch.int8))
    return own


def _check(name: str, value: Any, expected: str, fits: Any) -> None:
    if not (isinstance(value, numbers.Real) and not isinstance(value, bool) and fits(value)):
        raise UserError(f"{name}={value!r}: expected a number, {expected}.")
