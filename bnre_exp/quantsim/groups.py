"""The one decision that insertion and folding share: which layer, BN and activation form a group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnre_exp.quantsim.layout import CONVS, LAYERS, out_channels
from bnre_exp.quantsim.quantizer import ActivationQuantizer
from bnre_exp.quantsim.trace import BatchNormNd

PLAIN_BN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormNd)
RELU_LIKE_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh)
RELU_LIKE_CALLS = {torch.relu, F.relu, F.relu6, F.leaky_relu, F.hardtanh, "relu"}


@dataclass(frozen=True)
class Group:
    """Nodes that run as one operation on the target: layer → BN → activation, or BN → depthwise layer → activation.

    ``output`` is the node whose value leaves the group.
    """

    layer: fx.Node
    bn: Optional[fx.Node]
    bn_before: bool
    activation: Optional[fx.Node]
    output: fx.Node

    @property
    def inner(self) -> Iterator[fx.Node]:
        """Nodes whose value stays within the group."""
        return (node for node in (self.layer, self.bn, self.activation) if node is not None and node is not self.output)


@dataclass(frozen=True)
class Grouping:
    """All groups of a graph in order of execution, and each BN that no layer takes in, with the reason."""

    groups: tuple[Group, ...]
    kept: dict[str, str]  # BN name -> reason


def module_of(node: Any) -> Any:
    """The module that a node calls, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    root = node.graph.owning_module
    return root.get_submodule(str(node.target)) if root is not None else None


def source_of(node: fx.Node) -> Any:
    """The node (or constant) that a node reads first."""
    return node.args[0] if node.args else None


def is_bn(node: Any) -> bool:
    """Whether the node calls a batch norm module."""
    return isinstance(module_of(node), _BatchNorm)


def is_layer(node: Any) -> bool:
    """Whether the node calls a conv or linear layer."""
    return isinstance(module_of(node), LAYERS)


def is_relu_like(node: Any) -> bool:
    """A piecewise linear activation, which integer kernels apply to their output at no cost."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_module":
        return isinstance(module_of(node), RELU_LIKE_MODULES)
    return node.op in ("call_function", "call_method") and node.target in RELU_LIKE_CALLS


def sole_user(node: fx.Node) -> Any:
    """The one node that reads this one's value, if it reads it once and as its first argument, else None."""
    users = list(node.users)
    if len(users) != 1 or sum(value is node for value in users[0].all_input_nodes) != 1:
        return None
    return users[0] if source_of(users[0]) is node else None


def find_groups(graph: fx.GraphModule) -> Grouping:
    """Groups of a traced network or of a simulation. Node shapes must be known (``meta["ndim"]``)."""
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
            bn_of.update({source_of(node): (node, False) for node in nodes})
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
    return Grouping(tuple(groups), kept)


def _why_not_after_layer(bns: list[fx.Node], calls: dict[Any, list[fx.Node]]) -> Optional[str]:
    """None if all calls of this BN can be folded into the layer before it; else the reason in words."""
    bn = module_of(bns[0])
    if type(bn) not in PLAIN_BN:
        return f"a BN subclass with a forward of its own ({type(bn).__name__})"
    if bn.running_mean is None or bn.running_var is None:
        return "no running statistics: it normalizes each batch by its own"
    for node in bns:
        source = source_of(node)
        if isinstance(module_of(source), ActivationQuantizer):
            return "a quantizer between the layer and the BN"
        if not is_layer(source):
            return f"no conv or linear layer directly before it (its input is {_describe(source)})"
        reason = _why_not_pair(source, node, bn)
        if reason:
            return reason
    layers = {source_of(node).target for node in bns}
    if len(layers) > 1:
        return f"shared by several layers ({', '.join(sorted(map(str, layers)))})"
    name = next(iter(layers))
    callers = calls[name]
    if any(node.op == "get_attr" for node in callers):
        return f"the weight of {name} is also read elsewhere"
    if len(callers) != len(bns):
        return f"the layer {name} is called more than once, and not always followed by this BN"
    return None


def _why_not_pair(layer_node: fx.Node, bn_node: fx.Node, bn: Any) -> Optional[str]:
    layer = module_of(layer_node)
    if any(module._forward_hooks or module._forward_pre_hooks for module in (layer, bn)):
        return f"a forward hook on the BN or on {layer_node.target}"
    if sole_user(layer_node) is not bn_node:
        others = [_describe(user) for user in layer_node.users if user is not bn_node]
        return f"the output of {layer_node.target} has another consumer ({', '.join(others)})"
    expected = 2 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 2
    if layer_node.meta.get("ndim") != expected:
        return f"the channels of {layer_node.target}'s output are not on the axis that BN normalizes"
    if bn.num_features != out_channels(layer):
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
    if not isinstance(conv, CONVS) or conv.groups != conv.in_channels or conv.in_channels != bn.num_features:
        return False
    no_padding = conv.padding == "valid" or not any(conv.padding) if conv.padding != "same" else False
    following = [sole_user(user) for user in users]
    has_bn_after = any(is_bn(node) for node in following)
    return no_padding and not has_bn_after and bns[0].meta.get("ndim") == len(conv.kernel_size) + 2


def _describe(node: Any) -> str:
    if not isinstance(node, fx.Node):
        return repr(node)
    if node.op == "call_module":
        return f"{node.target} ({type(module_of(node)).__name__})"
    return f"the network's input {node.name}" if node.op == "placeholder" else node.name
