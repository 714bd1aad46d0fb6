"""The one decision that insertion and folding share: which layer, BN and activation form a group."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

from bnre_exp.quantsim.nodes import (
    describe,
    is_bn,
    is_identity,
    is_layer,
    is_rearranging,
    is_relu_like,
    module_of,
    readers,
    sole_user,
    source_of,
)
from bnre_exp.quantsim.quantizers.layout import CONVS, LAYERS, out_channels
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer
from bnre_exp.quantsim.tracing.functional import FunctionalBatchNorm, is_call, why_function
from bnre_exp.quantsim.tracing.trace import BatchNormNd

PLAIN_BN = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormNd, FunctionalBatchNorm, FrozenBatchNorm2d
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Nodes that run as one operation on the target: layer → BN → activation, or BN → depthwise layer → activation.

    ``output`` is the node whose value leaves the group.
    """

    layer: fx.Node
    bn: fx.Node | None
    bn_before: bool
    activation: fx.Node | None
    output: fx.Node

    @property
    def inner(self) -> Iterator[fx.Node]:
        """Nodes whose value stays within the group."""
        return (node for node in (self.layer, self.bn, self.activation) if node is not None and node is not self.output)


@dataclass(frozen=True)
class Grouping:
    """All groups of a graph in order of execution, and each BN that no layer takes in, with the reason; functional:
    those that are calls of a function, and stay so."""

    groups: tuple[Group, ...]
    kept: dict[str, str]  # BN name -> reason
    functional: dict[str, str]  # name of the call -> reason


def find_groups(graph: fx.GraphModule) -> Grouping:
    """Groups of a traced network that was recorded, or of a simulation of it."""
    calls: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[node.target].append(node)
    for node in graph.graph.find_nodes(op="get_attr"):  # a layer whose weight is also read directly counts as shared
        calls[str(node.target).rpartition(".")[0]].append(node)
    bn_of: dict[fx.Node, tuple[fx.Node, bool]] = {}
    kept: dict[str, str] = {}
    for target, nodes in calls.items():
        if nodes[0].op == "get_attr" or not is_bn(nodes[0]):
            continue
        reason = _why_not_after_layer(nodes, calls)
        if reason is None:
            bn_of.update({_layer_before(node): (node, False) for node in nodes})
        elif _is_before_depthwise(nodes, calls):
            bn_of.update({sole_user(node): (node, True) for node in nodes})
        else:
            kept[target] = nodes[0].meta.get("kept_reason", reason)
    groups = []
    for node in graph.graph.nodes:
        if is_layer(node):
            bn, before = bn_of.get(node, (None, False))
            last = node if bn is None or before else bn
            following = sole_user(last)
            activation = following if is_relu_like(following) else None
            groups.append(Group(node, bn, before, activation, activation or last))
    functional = {node.name: why_function(node) for node in graph.graph.nodes if is_call(node)}
    return Grouping(tuple(groups), kept, functional)


def per_output_channel(group: Group, values: Tensor) -> Tensor:
    """A vector over the channels of the group's BN as one over the output channels of its layer."""
    if not group.bn_before:
        return values
    layer = module_of(group.layer)  # input channel c meets the output channels c * m ... c * m + m - 1
    return values.repeat_interleave(layer.out_channels // layer.in_channels)


def negative_gammas(grouping: Grouping) -> dict[str, Tensor]:
    """For each layer that takes in a BN, by name, its output channels whose gamma is below 0; bool, ``[C_out]``."""
    found = {}
    for group in grouping.groups:
        if group.bn is not None:
            bn: Any = module_of(group.bn)
            gamma = torch.ones_like(bn.running_var) if bn.weight is None else bn.weight.detach()
            found[str(group.layer.target)] = per_output_channel(group, gamma < 0)
    return found


def _why_not_after_layer(bns: list[fx.Node], calls: dict[Any, list[fx.Node]]) -> str | None:
    """None if all calls of this BN can be folded into the layer before it; else the reason in words."""
    bn = module_of(bns[0])
    if type(bn) not in PLAIN_BN:
        return f"a BN subclass with a forward of its own ({type(bn).__name__})"
    if bn.running_mean is None or bn.running_var is None:
        return "no running statistics: it normalizes each batch by its own"
    for node in bns:
        if isinstance(module_of(source_of(node)), ActivationQuantizer):
            return "a quantizer between the layer and the BN"
        layer = _layer_before(node)
        if layer is None:
            return _why_no_layer(source_of(node))
        reason = _why_not_pair(layer, node, bn)
        if reason:
            return reason
    layers = {_layer_before(node).target for node in bns}
    if len(layers) > 1:
        return f"shared by several layers ({', '.join(sorted(map(str, layers)))})"
    name = next(iter(layers))
    callers = calls[name]
    if any(node.op == "get_attr" for node in callers):
        return f"the weight of {name} is also read elsewhere"
    if len(callers) != len(bns):
        return f"the layer {name} is called more than once, and not always followed by this BN"
    return None


def _why_no_layer(source: Any) -> str:
    whole: Any = source_of(source) if source.target is operator.getitem else None
    if isinstance(module_of(whole), LAYERS):
        return f"{whole.target} gives several outputs and is kept whole"
    return f"no conv or linear layer directly before it (its input is {describe(source)})"


def _layer_before(bn: fx.Node) -> Any:
    """The layer whose output a BN reads in evaluation mode, as it is or put in another shape, else None."""
    source = source_of(bn)
    while is_rearranging(source) or is_identity(source):
        source = source_of(source)
    return source if is_layer(source) else None


def num_features(bn: Any) -> int:
    """Channels of a batch norm with running statistics."""
    return int(bn.running_mean.numel())


def _why_not_pair(layer_node: fx.Node, bn_node: fx.Node, bn: Any) -> str | None:
    layer = module_of(layer_node)
    if any(module._forward_hooks or module._forward_pre_hooks for module in (layer, bn)):
        return f"a forward hook on the BN or on {layer_node.target}"
    node = bn_node
    while node is not layer_node:
        source = source_of(node)
        if sole_user(source) is not node:
            others = [describe(user) for user in readers(source) if user is not node]
            return f"the output of {layer_node.target} has another consumer ({', '.join(others)})"
        node = source
    if source_of(bn_node).meta.get("channel_axis") != 1:
        return f"the channels of {layer_node.target}'s output are not on the axis that BN normalizes"
    if num_features(bn) != out_channels(layer):
        return f"{layer_node.target} has another number of channels"
    return None


def _is_before_depthwise(bns: list[fx.Node], calls: dict[Any, list[fx.Node]]) -> bool:
    """BN → depthwise conv without padding: each input channel meets one row of weights everywhere, so it is exact."""
    bn = module_of(bns[0])
    if type(bn) not in PLAIN_BN or bn.running_mean is None:
        return False
    users = [sole_user(node) for node in bns]
    layers = {user.target if is_layer(user) else None for user in users}
    if len(layers) != 1 or None in layers or len(calls[next(iter(layers))]) != len(bns):
        return False
    conv = module_of(users[0])
    if parametrize.type_before_parametrizations(conv) not in CONVS:  # a subclass may pad in its own way
        return False
    if conv.groups != conv.in_channels or conv.in_channels != num_features(bn):
        return False
    no_padding = conv.padding == "valid" or not any(conv.padding) if conv.padding != "same" else False
    following = [sole_user(user) for user in users]
    has_bn_after = any(is_bn(node) for node in following)
    return no_padding and not has_bn_after and bns[0].meta.get("ndim") == len(conv.kernel_size) + 2
