"""What a node of a graph is, and who reads it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, LAYERS
from bnre_exp.quantsim.tracing.metadata import METADATA_ATTRIBUTES, METADATA_METHODS
from bnre_exp.quantsim.tracing.tracer import check_decision

RELU_LIKE_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh)
RELU_LIKE_CALLS = {torch.relu, F.relu, F.relu6, F.leaky_relu, F.hardtanh, "relu"}
# These put values elsewhere, and neither add nor choose any.
REARRANGING_MODULES = (nn.Flatten, nn.Unflatten)
REARRANGING_CALLS = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.swapaxes, torch.movedim, torch.squeeze,
    torch.unsqueeze, "flatten", "reshape", "permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze",
    "view", "contiguous", "unflatten", "reshape_as", "view_as",
}  # fmt: skip
LIKE_METHODS = ("reshape_as", "view_as", "expand_as", "type_as")  # read the size or type of their second operand


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
    return isinstance(module_of(node), BATCH_NORMS)


def is_layer(node: Any) -> bool:
    """Whether the node calls a conv or linear layer that computes with its weight as it is."""
    return isinstance(module_of(node), LAYERS) and bool(node.meta.get("scales_with_weight", True))


def is_relu_like(node: Any) -> bool:
    """A piecewise linear activation, which integer kernels apply to their output at no cost."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_module":
        return isinstance(module_of(node), RELU_LIKE_MODULES)
    return node.op in ("call_function", "call_method") and node.target in RELU_LIKE_CALLS


def is_rearranging(node: Any) -> bool:
    """Whether the output holds the values of the first input, each once, in another order or shape."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_module":
        return type(module_of(node)) in REARRANGING_MODULES
    return node.op in ("call_function", "call_method") and node.target in REARRANGING_CALLS


def is_identity(node: Any) -> bool:
    """Whether the node hands on its input in evaluation mode, as dropout does."""
    return isinstance(node, fx.Node) and bool(node.meta.get("is_identity"))


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read this one's values; asking for its shape or type does not count."""
    return [user for user in node.users if not _asks_for_size(user, node)]


def sole_user(node: fx.Node) -> Any:
    """The one node that reads this one's values, if it reads them once and as its first argument, else None."""
    users = readers(node)
    if len(users) != 1 or sum(value is node for value in users[0].all_input_nodes) != 1:
        return None
    return users[0] if source_of(users[0]) is node else None


def describe(node: Any) -> str:
    """The node in a message."""
    if not isinstance(node, fx.Node):
        return repr(node)
    if node.op == "call_module":
        return f"{node.target} ({type(module_of(node)).__name__})"
    return f"the network's input {node.name}" if node.op == "placeholder" else node.name


def _asks_for_size(user: fx.Node, node: fx.Node) -> bool:
    if user.target is check_decision:
        return True
    if user.op == "call_method":
        return user.target in METADATA_METHODS or (user.target in LIKE_METHODS and source_of(user) is not node)
    return user.op == "call_function" and user.target is getattr and user.args[1] in METADATA_ATTRIBUTES
