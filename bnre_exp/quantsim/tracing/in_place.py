"""Operations that overwrite a tensor become ones that make another."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

from bnre_exp.quantsim.tracing.network import TracedNetwork
from bnre_exp.quantsim.tracing.proxies import assigned, is_in_place

_INPLACE_OPERATORS = {
    name: name[1:] if name not in ("iand", "ior") else name[1:] + "_"
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "imatmul", "iand", "ior")
}

_FILLING = ("copy_", "fill_", "zero_")  # all of a tensor


def make_out_of_place(traced: TracedNetwork) -> None:
    """Later readers of a tensor that was changed in place read the result instead; the values stay the same."""
    order = {node: index for index, node in enumerate(traced.all_nodes())}
    for node in list(order):
        changed = False
        if node.op == "call_module":
            module = traced.get_submodule(node.target)
            if getattr(module, "inplace", False):
                changed = True
        elif node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            changed = node.target is assigned
            if node.target is torch.empty and "memory_format" not in node.kwargs:
                node.target = torch.zeros  # of all that could be there, what a checkpoint may hold
            plain = name[:-1] if name.endswith("_") and not name.startswith("_") else None
            if node.target is getattr(operator, name, None) and name in _INPLACE_OPERATORS:
                node.target, changed = getattr(operator, _INPLACE_OPERATORS[name]), True
            elif plain and (function := getattr(torch, plain, None) or getattr(F, plain, None)):
                node.target, changed = function, True
            if node.kwargs.get("inplace"):
                node.kwargs, changed = {**node.kwargs, "inplace": False}, True
        elif node.op == "call_method" and is_in_place(node.target):
            changed = True
            if node.target in _FILLING:
                value = node.args[1:2] or tuple(node.kwargs.values())[:1] or (0,)
                node.op, node.target = "call_function", assigned
                node.args, node.kwargs = (node.args[0], ..., *value), {}
            elif hasattr(torch.Tensor, node.target[:-1]):  # of random numbers there is no other
                node.target = node.target[:-1]
        if changed and node.args and isinstance(node.args[0], fx.Node):
            _read_instead(node.args[0], node, order)
    for module in traced.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]


def _read_instead(changed: fx.Node, result: fx.Node, order: dict[fx.Node, int]) -> None:
    """All that read ``changed`` after ``result`` was computed read ``result``."""
    changed.replace_all_uses_with(result, lambda user: user is not result and order[user] > order[result])
