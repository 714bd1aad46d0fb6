"""Networks that are known to be written as ONNX, told by their operations, without an export that takes seconds."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.export.onnx.plain import OPSETS
from bnre_exp.quantsim.nodes import is_layer, module_of, source_of
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer, WeightQuantizer

SIMPLE = (nn.Linear, nn.ReLU, nn.ReLU6, nn.Dropout, nn.Identity)
LARGEST_BITS = 8  # beyond, an opset may lack the type
LARGEST_NETWORK = 2**28  # numbers; a file holds 2 GB


def is_known_to_export(sim: Any, example: Any, opset: int) -> bool:
    """Whether a simulation is of operations alone which every opset can express, whatever their values and sizes: plain
    convolutions, linear layers and batch norms behind them, ReLU, sums, and pooling. False: that is to be tried."""
    if not (isinstance(sim, fx.GraphModule) and isinstance(example, Tensor) and example.dim() == 4):
        return False
    size, low, high = sum(p.numel() for p in sim.parameters()), *OPSETS
    is_single = all(p.dtype == torch.float32 for p in sim.parameters()) and example.dtype == torch.float32
    is_usual = type(opset) is int and low <= opset <= high and len(example) >= 2 and size < LARGEST_NETWORK
    return is_single and is_usual and all(_is_known(node) for node in sim.graph.nodes)


def _is_known(node: fx.Node) -> bool:
    module = module_of(node)
    if module is not None:
        return bool(node.args) and len(node.all_input_nodes) == 1 and _is_known_module(node, module)
    if node.op == "placeholder":
        return len(node.graph.find_nodes(op="placeholder")) == 1
    if node.op == "output":
        return isinstance(node.args[0], fx.Node)
    if node.target in (operator.add, torch.add):
        return len(node.args) == 2 and all(isinstance(part, fx.Node) for part in node.args) and not node.kwargs
    if node.target is torch.flatten:
        return node.args[1:] == (1,) and not node.kwargs
    return node.target is F.adaptive_avg_pool2d and node.args[1:] in ((1,), ((1, 1),)) and not node.kwargs


def _is_known_module(node: fx.Node, module: Any) -> bool:
    kind = parametrize.type_before_parametrizations(module)
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if parametrize.is_parametrized(module):
        chains = [(name, list(chain)) for name, chain in module.parametrizations.items()]
        if not all(name == "weight" and type(one) is WeightQuantizer and not rest for name, (one, *rest) in chains):
            return False
        if module.parametrizations.weight[0].bits > LARGEST_BITS:
            return False
    if kind is ActivationQuantizer:
        return bool(module.bits <= LARGEST_BITS)
    if kind is nn.Conv2d:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if kind is nn.BatchNorm2d:  # it goes into the convolution
        source = source_of(node)
        return is_layer(source) and len(source.users) == 1 and module.affine and module.running_mean is not None
    if kind is nn.MaxPool2d:
        return not (module.return_indices or module.ceil_mode) and module.dilation in (1, (1, 1))
    if kind is nn.AdaptiveAvgPool2d:
        return module.output_size in (1, (1, 1))
    return kind in SIMPLE or (kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1))
