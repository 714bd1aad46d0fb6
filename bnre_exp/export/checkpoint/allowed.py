"""What a checkpoint may call: the functions, methods, attributes and module classes that its names stand for.

Names are looked up in these tables and nowhere else, so that reading a checkpoint never imports or finds anything.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import get_testing_overrides

from bnre_exp.quantsim.quantizers.affine import ChannelAffine
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer
from bnre_exp.quantsim.tracing.proxies import assigned
from bnre_exp.quantsim.tracing.trace import BatchNormNd, FollowTraining
from bnre_exp.quantsim.tracing.tracer import check_decision

OPERATORS = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "invert", "abs",
    "and_", "or_", "xor", "lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge", "getitem",
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul",
    "iand", "ior", "ixor", "ilshift", "irshift",
)  # fmt: skip
# Functions of tensors all the same, but absent from torch's own list of them.
MORE_FUNCTIONS = (
    "tanh", "sigmoid", "hardsigmoid", "hardswish", "upsample", "upsample_nearest", "upsample_bilinear",
    "relu_", "hardtanh_", "elu_", "selu_", "celu_", "leaky_relu_", "rrelu_", "threshold_",
)  # fmt: skip
# Integers of any length, which take any time and memory.
REFUSED_MATH = ("factorial", "comb", "perm")
# Functions that make a tensor.
FACTORIES = (
    "arange", "as_tensor", "asarray", "eye", "full", "linspace", "ones", "tensor", "zeros", "empty_like", "rand",
    "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "finfo", "iinfo",
)  # fmt: skip
# These read packed weights as raw memory, or exist for one kind of device.
REFUSED_FUNCTIONS = ("fbgemm_", "quantized_", "miopen_")
# These take code, hand out memory or attach hooks.
REFUSED_METHODS = {
    "apply_", "map_", "map2_", "register_hook", "register_post_accumulate_grad_hook", "backward", "retain_grad",
    "reinforce", "module_load", "as_subclass", "numpy", "data_ptr", "const_data_ptr", "storage", "untyped_storage",
    "storage_type", "set_", "share_memory_", "pin_memory", "record_stream", "resize", "resize_", "resize_as",
    "resize_as_", "resize_as_sparse_", "sparse_resize_", "sparse_resize_and_clear_",
}  # fmt: skip
ATTRIBUTES = frozenset(  # of tensors, of torch.finfo, and of what torch.max and torch.sort give
    {"shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag"}
    | {"min", "max", "eps", "tiny"}
    | {"values", "indices"}
)
# Names of the format, which stay when code moves: checkpoints that were written hold them.
DECISION = "bnre_exp.quantsim.tracer.check_decision"
ASSIGNED = "bnre_exp.quantsim.tracing.proxies.assigned"
OWN_MODULES = {
    "bnre_exp.quantsim.quantizer.ActivationQuantizer": ActivationQuantizer,
    "bnre_exp.quantsim.trace.FollowTraining": FollowTraining,
    "bnre_exp.quantsim.trace.BatchNormNd": BatchNormNd,
    "bnre_exp.quantsim.affine.ChannelAffine": ChannelAffine,
}


@cache
def functions() -> dict[str, Callable[..., Any]]:
    """Function by its qualified name. ``getattr`` is among them; only :data:`ATTRIBUTES` may be read with it."""
    found: dict[str, Callable[..., Any]] = {"builtins.getattr": getattr, DECISION: check_decision, ASSIGNED: assigned}
    found |= {f"operator.{name}": getattr(operator, name) for name in OPERATORS}
    found |= {f"math.{name}": f for name, f in vars(math).items() if _is_math(name, f)}
    on_tensors = get_testing_overrides()
    for space in (torch, F, torch.special, torch.linalg, torch.fft):
        for name, function in inspect.getmembers(space, inspect.isroutine):
            if not name.startswith(("_", *REFUSED_FUNCTIONS)) and function in on_tensors:
                found[f"{space.__name__}.{name}"] = function
    found |= {f"torch.nn.functional.{name}": getattr(F, name) for name in MORE_FUNCTIONS if hasattr(F, name)}
    found |= {f"torch.{name}": getattr(torch, name) for name in FACTORIES}
    for name in torchvision.ops.__all__:
        if inspect.isfunction(function := getattr(torchvision.ops, name)):
            found[f"torchvision.ops.{name}"] = function
    return found


def _is_math(name: str, function: Any) -> bool:
    return callable(function) and not name.startswith("_") and name not in REFUSED_MATH


@cache
def function_names() -> dict[Callable[..., Any], str]:
    """The first name of each function."""
    names: dict[Callable[..., Any], str] = {}
    for name, function in functions().items():
        names.setdefault(function, name)
    return names


@cache
def methods() -> frozenset[str]:
    """Names of the methods of tensors."""
    public = {name for name in dir(Tensor) if not name.startswith("_") and callable(getattr(Tensor, name))}
    return frozenset(public - REFUSED_METHODS)


@cache
def module_classes() -> dict[str, type[nn.Module]]:
    """Module class by its qualified name."""
    found: dict[str, type[nn.Module]] = dict(OWN_MODULES)
    for space, names in ((nn, dir(nn)), (torchvision.ops, torchvision.ops.__all__)):
        for name in names:
            kind = getattr(space, name)
            if inspect.isclass(kind) and issubclass(kind, nn.Module) and _is_layer_class(name):
                found[f"{space.__name__}.{name}"] = kind
    return found


def _is_layer_class(name: str) -> bool:
    """Lazy classes turn into others at the first call; a DataParallel would look for devices."""
    return not name.startswith(("_", "Lazy")) and name not in ("Module", "Container", "DataParallel")


@cache
def module_class_names() -> dict[type[nn.Module], str]:
    """The name of each class."""
    return {kind: name for name, kind in module_classes().items()}
