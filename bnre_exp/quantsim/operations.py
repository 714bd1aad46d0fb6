"""What an operation of a graph does to a quantized tensor."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from bnre_exp.quantsim.nodes import is_identity, module_of, source_of
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer
from bnre_exp.quantsim.tracing.trace import FollowTraining

# These move or select values, so a value on the grid stays on it.
PRESERVING_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Flatten, nn.Unflatten, nn.Identity, nn.ReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
    nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle,
    torchvision.ops.StochasticDepth, torchvision.ops.Permute,
)  # fmt: skip
PRESERVING_FUNCTIONS = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk,
    torch.split, torch.narrow, torch.select, torch.unbind, torch.relu, torch.movedim, torch.roll,
    torch.flip, torch.clone, torch.detach, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, torch.channel_shuffle,
    torch.pixel_shuffle, torch.pixel_unshuffle, torch.swapaxes, torch.broadcast_to, torch.t, torch.index_select,
    F.relu, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    F.adaptive_max_pool3d, operator.getitem, getattr,
}  # fmt: skip
PRESERVING_METHODS = {
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "chunk", "split",
    "expand", "expand_as", "repeat", "clone", "detach", "relu", "narrow", "select", "unbind", "size", "dim", "t",
    "view_as", "reshape_as", "unflatten", "movedim", "swapaxes", "roll", "flip", "to", "float", "type_as",
}  # fmt: skip
STOCHASTIC_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
                      torchvision.ops.StochasticDepth)  # fmt: skip
STOCHASTIC_CLASSES = ("timm.layers.drop.DropPath",)
NONNEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softplus)
NONNEGATIVE_CALLS = {
    torch.relu, F.relu, F.relu6, torch.sigmoid, F.sigmoid, F.hardsigmoid, torch.softmax, F.softmax, F.softplus,
    torch.abs, torch.square, torch.exp, "relu", "sigmoid", "softmax", "abs", "square", "exp",
}  # fmt: skip
# Non-negative where all their tensor operands are.
MONOTONE_MODULES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
                    nn.AdaptiveAvgPool3d)  # fmt: skip
MONOTONE_CALLS = {
    operator.add, torch.add, operator.mul, torch.mul, torch.cat, torch.concat, torch.mean, torch.sum, F.avg_pool1d,
    F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    "add", "mul", "mean", "sum",
}  # fmt: skip


def is_preserving(node: fx.Node) -> bool:
    """Whether the output holds only values of the input (and zeros, or the infinity before a max pooling), so that it
    needs no quantizer of its own."""
    if node.op == "call_module":
        module = module_of(node)
        if is_identity(node) or does_nothing_in_evaluation(node):
            return True
        return isinstance(module, PRESERVING_MODULES)
    if node.target is F.pad:
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value", None)
        is_never_chosen = isinstance(value, float) and math.isinf(value)  # by the max pooling that this is for
        return bool(mode != "constant" or not value or is_never_chosen)
    if node.op == "call_function":
        return bool(node.target in PRESERVING_FUNCTIONS)
    return node.op == "call_method" and node.target in PRESERVING_METHODS


def does_nothing_in_evaluation(node: fx.Node) -> bool:
    """Whether the node is dropout or stochastic depth, which hands on its input in evaluation mode, whatever it is."""
    module = module_of(node)
    if isinstance(module, FollowTraining):
        return module.function != "rrelu"
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return type(module) in STOCHASTIC_MODULES or name in STOCHASTIC_CLASSES


def is_nonnegative(node: Any, known: Mapping[fx.Node, bool] | None = None) -> bool:
    """Whether every value of the node's output is provably >= 0, whatever the input. known: of nodes asked before."""
    if not isinstance(node, fx.Node):
        return isinstance(node, (int, float)) and bool(node >= 0)
    if known and node in known:
        return known[node]
    module = module_of(node)
    if isinstance(module, ActivationQuantizer):
        return module.unsigned
    if isinstance(module, NONNEGATIVE_MODULES):
        return True
    if node.op in ("call_function", "call_method") and node.target in NONNEGATIVE_CALLS:
        return True
    if node.op == "call_module":
        passes_on = is_preserving(node) or isinstance(module, MONOTONE_MODULES)
    else:
        passes_on = is_preserving(node) or (node.op != "get_attr" and node.target in MONOTONE_CALLS)
    operands = node.all_input_nodes  # those that are not floating point, such as sizes, count as possibly negative
    if is_preserving(node):
        operands = operands[:1]
    values = [] if is_preserving(node) else [*node.args, *node.kwargs.values()]  # add(x, y, alpha=-1) subtracts
    constants = [value for value in values if isinstance(value, (int, float))]
    return passes_on and bool(operands) and all(is_nonnegative(operand, known) for operand in (*operands, *constants))


def input_quantizer(layer: fx.Node) -> ActivationQuantizer | None:
    """The quantizer whose grid the layer's input is on, also through operations that only move values."""
    source = source_of(layer)
    while isinstance(source, fx.Node) and is_preserving(source):
        source = source_of(source)
    module = module_of(source)
    return module if isinstance(module, ActivationQuantizer) else None
