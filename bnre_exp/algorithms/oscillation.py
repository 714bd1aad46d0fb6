"""Weights that oscillate between two integers in quantization-aware training: how many, and two ways to stop them.

Source: Nagel, Fournarakis, Bondarenko and Blankevoort, "Overcoming oscillations in quantization-aware training", ICML
2022, section 4.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError, few
from bnre_exp.quantsim.quantizers.quantizer import WeightQuantizer, positive
from bnre_exp.quantsim.sim import weight_quantizers

METHODS = ("none", "dampening", "freezing")
OSCILLATING = 0.005  # a weight of a higher frequency oscillates


@dataclass(frozen=True)
class LayerShare:
    """Of a layer: its weights, and which parts of them oscillate and are frozen, in [0, 1]."""

    layer: str
    weights: int
    oscillating: float
    frozen: float


@dataclass(frozen=True)
class _Layer:
    """A quantized weight, and where its state is: views of the tensors of all weights, in the weight's shape."""

    name: str
    quantizer: WeightQuantizer
    weight: nn.Parameter
    codes: Tensor
    frozen: Tensor | None

    def scale(self) -> Tensor:
        return self.quantizer.layout.expand(positive(self.quantizer.scale))


@dataclass(frozen=True)
class Oscillations:
    """Follows the integer weights of a simulation step by step; :func:`~bnre_exp.train` calls it. It changes in place.

    tensors: of all N weights, ``[N]`` each: ``codes``, the integers after the last step (int16); ``direction``, that of
    each one's last change (-1, 1; 0: never); ``frequency``, the moving average of its oscillations. With freezing also
    ``average``, of the integers, and ``frozen``: whether a weight is held at its entry in ``codes``.
    """

    method: str
    momentum: float
    dampening: float
    freeze_from: float
    freeze_to: float
    layers: tuple[_Layer, ...] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)

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
                _correct_scale_gradient(layer)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Take in the integers that a step of the optimizer left, once, and freeze weights that oscillate too often."""
        before, frozen = self.tensors["codes"], self.tensors.get("frozen")
        now = torch.empty_like(before)
        for layer, part in zip(self.layers, now.split([layer.weight.numel() for layer in self.layers])):
            part.view(layer.weight.shape).copy_(layer.quantizer.codes(layer.weight))
        if frozen is not None:
            now = torch.where(frozen, before, now)
        follow(now, before, self.tensors["direction"], self.tensors["frequency"], self.momentum)
        before.copy_(now)
        if frozen is not None:
            average = self.tensors["average"]
            new = (self.tensors["frequency"] > annealed(self.freeze_from, self.freeze_to, progress)) & ~frozen
            before.copy_(torch.where(new, average.round().to(before.dtype), before))
            frozen |= new
            average.lerp_(now.to(average.dtype), self.momentum)
            self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Put the latent weights of frozen ones at integer times scale, as that now is."""
        for layer in self.layers:
            if layer.frozen is not None:
                held = (layer.codes * layer.scale()).to(layer.weight.dtype)
                layer.weight.copy_(torch.where(layer.frozen, held, layer.weight))

    def shares(self) -> dict[str, float]:
        """Parts of all weights that oscillate, and with freezing that are frozen, in [0, 1]."""
        rows, total = self.by_layer(), self.tensors["codes"].numel()
        found = {"oscillating": sum(row.oscillating * row.weights for row in rows) / total}
        if "frozen" in self.tensors:
            found["frozen"] = sum(row.frozen * row.weights for row in rows) / total
        return found

    def by_layer(self) -> list[LayerShare]:
        """Of each layer, how many of its weights oscillate: more often than with a frequency of 0.005, and they are not
        frozen, as frozen ones stand still while their frequency decays."""
        frozen = self.tensors.get("frozen")
        frozen = torch.zeros_like(self.tensors["frequency"], dtype=torch.bool) if frozen is None else frozen
        often = (self.tensors["frequency"] > OSCILLATING) & ~frozen
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

    The simulation must be where it is trained, and may not be replaced or moved before that. Raises ``UserError`` for a
    simulation without quantized weights, two of whose layers share a weight, and for numbers that make no sense.
    """
    if method not in METHODS:
        raise UserError(f"method={method!r}: expected one of {', '.join(METHODS)}.")
    _check("momentum", momentum, "more than 0 and at most 1", lambda x: 0 < x <= 1)
    _check("dampening", dampening, "0 or more", lambda x: x >= 0)
    for name, value in (("freeze_from", freeze_from), ("freeze_to", freeze_to)):
        _check(name, value, "0 to 1", lambda x: 0 <= x <= 1)
    quantizers, weights = weight_quantizers(sim), _latent_weights(sim)
    tensors = _state([quantizer.codes(weights[name]) for name, quantizer in quantizers.items()])
    if method != "freezing":
        del tensors["average"], tensors["frozen"]
    codes, frozen = (_views(tensors.get(name), weights) for name in ("codes", "frozen"))
    layers = tuple(_Layer(name, quantizers[name], weights[name], codes[name], frozen.get(name)) for name in weights)
    return Oscillations(method, momentum, dampening, freeze_from, freeze_to, layers, tensors)


@torch.no_grad()
def follow(now: Tensor, before: Tensor, direction: Tensor, frequency: Tensor, momentum: float) -> None:
    """Take one step of integer weights into ``direction`` and ``frequency``, in place; all of one shape.

    now, before: integers after this step and the one before. An oscillation is a change against ``direction``, that of
    the change before (section 4.1 of the paper).
    """
    change = (now > before).to(direction.dtype) - (now < before).to(direction.dtype)
    oscillates = (change * direction) < 0
    frequency.mul_(1 - momentum).add_(oscillates.to(frequency.dtype), alpha=momentum)
    direction.copy_(torch.where(change != 0, change, direction))


def dampening_gradient(quantizer: WeightQuantizer, weight: Tensor, strength: float) -> Tensor:
    """The gradient of ``strength * ||w_hat - clip(w)||^2`` by the latent weight, w_hat and the range being constants: a
    weight outside of the range has none, since both are the end of it there."""
    scale = quantizer.layout.expand(positive(quantizer.scale)).to(weight.dtype)
    end = scale * quantizer.quant_max
    clipped = torch.minimum(torch.maximum(weight, -end), end)
    return (clipped - quantizer.codes(weight) * scale).mul_(2 * strength)


def annealed(start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` by half a cosine; progress: in [0, 1]."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's gradient in place; one that is not trained gets none."""
    if parameter.requires_grad:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _correct_scale_gradient(layer: _Layer) -> None:
    """A frozen weight is integer times scale, whose derivative by the scale is the integer. That of a weight which is
    rounded, as LSQ has it, is the distance to its integer, which is zero for a latent weight that is held there."""
    quantizer, grad, frozen = layer.quantizer, layer.weight.grad, layer.frozen
    if frozen is None or grad is None or quantizer.scale.grad is None:
        return
    rows = quantizer.layout.rows(torch.where(frozen, grad * layer.codes, 0), quantizer.per_channel)
    sign = torch.copysign(torch.ones_like(quantizer.scale), quantizer.scale)
    quantizer.scale.grad.add_(rows.sum(1) * sign * quantizer.gradient_scale(layer.weight))


def _latent_weights(sim: nn.Module) -> dict[str, nn.Parameter]:
    """The float weights behind all weight quantizers, by layer, each of one layer alone."""
    layers: dict[str, Any] = {name: sim.get_submodule(name) for name in weight_quantizers(sim)}
    weights: dict[str, nn.Parameter] = {name: layer.parametrizations.weight.original for name, layer in layers.items()}
    if not weights:
        raise UserError("track_oscillations: no weights of this network are quantized; expected what quantize() made.")
    shared = [name for name, weight in weights.items() if sum(weight is other for other in weights.values()) > 1]
    if shared:
        raise UserError(f"track_oscillations: {few(shared)} share a weight, which has no integer of its own.")
    return weights


def _state(codes: Sequence[Tensor]) -> dict[str, Tensor]:
    """What is known of all weights before the first step."""
    flat = torch.cat([each.flatten() for each in codes]).to(torch.int16)
    return {
        "codes": flat,
        "direction": torch.zeros_like(flat, dtype=torch.int8),
        "frequency": torch.zeros_like(flat, dtype=torch.float32),
        "average": flat.to(torch.float32),
        "frozen": torch.zeros_like(flat, dtype=torch.bool),
    }


def _views(flat: Tensor | None, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a tensor of all weights, by layer; none of a tensor that there is not."""
    parts = [] if flat is None else flat.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts)}


def _check(name: str, value: Any, expected: str, fits: Any) -> None:
    if not (isinstance(value, numbers.Real) and not isinstance(value, bool) and fits(value)):
        raise UserError(f"{name}={value!r}: expected a number, {expected}.")
