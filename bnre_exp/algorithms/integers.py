"""A folded network computed as integer kernels compute it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError
from bnre_exp.quantsim.nodes import is_layer, module_of, sole_user
from bnre_exp.quantsim.operations import input_quantizer
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer, Dequantize, WeightQuantizer, positive
from bnre_exp.quantsim.whole import parts_of, with_parts

KERNEL_BITS = 8  # integer kernels multiply no wider codes
PRECISE = (torch.float32, torch.float64)  # a layer in half precision rounds its sums
RELU_CALLS = {torch.relu, F.relu, "relu"}


@torch.no_grad()
def integer_simulation(folded: nn.Module) -> Any:
    """A copy of the network with its layers computed on integer codes, as the target does.

    folded: from :func:`~bnre_exp.fold_batch_norms` (or ``load_folded``), with biases from
    :func:`~bnre_exp.quantize_biases`. A layer adds up products of codes and its bias's code, in float32: exactly while
    sums stay below 2^24. Where its output is quantized, at most ReLU or a clip between, the sum is multiplied by
    float32 ``s_in * s_w / s_out`` and rounded half to even, which is what ONNX Runtime's integer kernels do; else by
    ``s_in * s_w``. ``folded`` itself computes with products of codes and scales in floating point, whose rounding puts
    a few values on the next code.

    Layers whose input, weight or bias is not in integers, or in more than 8 bits (bias: 32), those with a forward hook,
    and all other operations are computed as in ``folded``. The result is for evaluation; it is no network to export.

    Raises ``UserError`` if the network is not folded.
    """
    if parts_of(folded):
        return with_parts(folded, lambda _, network: integer_simulation(network))
    if not isinstance(folded, fx.GraphModule) or any(isinstance(m, WeightQuantizer) for m in folded.modules()):
        raise UserError("integer_simulation: expected a network that fold_batch_norms() or load_folded() returned.")
    network = copy.deepcopy(folded)
    inputs = {node: input_quantizer(node) for node in network.graph.nodes if is_layer(node)}
    targets = {node: _requantization(node) for node in inputs}
    for node, quantizer in inputs.items():
        layer, target = module_of(node), targets[node]
        if quantizer is None or not _is_in_use(quantizer) or _has_hooks(layer):
            continue
        multiplier = _output_step(layer, _step(quantizer))
        if multiplier is None:
            continue
        if target is not None:
            reader = module_of(target)
            multiplier = multiplier / _step(reader)
            _clip_in_steps(node, target, _step(reader))
            _replace(network, target, _Requantize(reader))
        _replace(network, node, IntegerLayer(layer, _step(quantizer), multiplier))
    network.delete_all_unused_submodules()
    network.graph.lint()
    network.recompile()
    return network


class IntegerLayer(nn.Module):
    """A layer of codes: from values on the input's grid to its sums times ``multiplier`` (``[C_out]`` or ``[1]``)."""

    input_step: Tensor
    multiplier: Tensor

    def __init__(self, layer: Any, input_step: Tensor, multiplier: Tensor) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        for parametrizations in self.layer.parametrizations.values():
            parametrizations[0].scale = torch.ones_like(parametrizations[0].scale, dtype=torch.float32)
            parametrizations[0].dtype = torch.float32
        self.register_buffer("input_step", input_step.clone())
        self.register_buffer("multiplier", multiplier.reshape(-1, *[1] * (layer.weight.ndim - 2)))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sums: Tensor = self.layer(torch.round(x.float() / self.input_step), *args, **kwargs)
        return (sums.round_() * self.multiplier).to(x.dtype)


class _Requantize(nn.Module):
    """A quantizer of values that are given in steps of its grid."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quant_max = quantizer.quant_max
        self.register_buffer("scale", _step(quantizer))
        self.register_buffer("zero_point", quantizer.grid_zero_point().clone())

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.round(x).add_(self.zero_point).clamp_(0, self.quant_max)
        return codes.sub_(self.zero_point).mul_(self.scale)


def _step(quantizer: ActivationQuantizer) -> Tensor:
    """What one code is worth, ``[1]``."""
    return positive(quantizer.scale).detach().float().clone()


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_in_use(quantizer: Any) -> bool:
    """Whether it is a quantizer that rounds, to codes that integer kernels take."""
    return (
        isinstance(quantizer, ActivationQuantizer)
        and quantizer.has_range
        and not quantizer.bypassed
        and quantizer.observer is None
        and quantizer.bits <= KERNEL_BITS
        and not _has_hooks(quantizer)
    )


def _output_step(layer: Any, input_step: Tensor) -> Tensor | None:
    """``s_in * s_w``, what one unit of a layer's sums is worth, ``[C_out]`` or ``[1]``; None unless all is integers."""
    weight = _dequantize(layer, "weight")
    if weight is None or weight.bits > KERNEL_BITS or weight.dtype not in PRECISE:
        return None
    step = input_step * weight.scale.float()
    if layer.bias is None:
        return step
    bias = _dequantize(layer, "bias")
    return step if bias is not None and torch.equal(bias.scale.float(), step.expand_as(bias.scale)) else None


def _dequantize(layer: Any, name: str) -> Dequantize | None:
    if not parametrize.is_parametrized(layer, name):
        return None
    chain = layer.parametrizations[name]
    return chain[0] if len(chain) == 1 and isinstance(chain[0], Dequantize) else None


def _requantization(layer: fx.Node) -> fx.Node | None:
    """The quantizer that a kernel ends with: the only reader of the layer's output, behind ReLU or a clip if any."""
    node = sole_user(layer)
    while node is not None and (_is_relu(node) or _limits(node) is not None):
        node = sole_user(node)
    return node if _is_in_use(module_of(node)) else None


def _is_relu(node: fx.Node) -> bool:
    return isinstance(module_of(node), nn.ReLU) or (node.op != "call_module" and node.target in RELU_CALLS)


def _limits(node: fx.Node) -> tuple[float, float] | None:
    """The limits of a ReLU6 or hardtanh if they are numbers, else None."""
    module = module_of(node)
    if isinstance(module, nn.Hardtanh):
        return module.min_val, module.max_val
    if node.target is F.relu6:
        return 0.0, 6.0
    if node.target is not F.hardtanh:
        return None
    given: dict[str, Any] = dict(zip(("min_val", "max_val"), node.args[1:3])) | dict(node.kwargs)
    low, high = given.get("min_val", -1.0), given.get("max_val", 1.0)
    return (low, high) if all(isinstance(limit, (int, float)) for limit in (low, high)) else None


def _clip_in_steps(layer: fx.Node, quantizer: fx.Node, step: Tensor) -> None:
    """Make the clips between the two clip what is given in steps: at the codes that the limits are rounded to."""
    node = quantizer.args[0]
    while isinstance(node, fx.Node) and node is not layer:
        before, limits = node.args[0], _limits(node)
        if limits is not None:
            with node.graph.inserting_after(node):
                low, high = (float((limit / step).round()) for limit in limits)
                clip = node.graph.call_function(torch.clamp, (before, low, high))
            node.replace_all_uses_with(clip)
            node.graph.erase_node(node)
        node = before


def _replace(network: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Let a node call another module, under a name of its own."""
    name = f"{node.name}_in_integers"
    while hasattr(network, name):
        name += "_"
    network.add_submodule(name, module)
    node.target = name
