"""Conv and linear layers whose class is not torch's own: what do they compute?

Their forward is traced. What it does then is known for certain, where trying it on numbers would leave doubts.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.quantsim.quantizers.layout import LAYERS
from bnre_exp.quantsim.tracing.metadata import is_metadata
from bnre_exp.quantsim.tracing.tracer import Tracer

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
PRODUCTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **{function: _CONV for function in (F.conv1d, F.conv2d, F.conv3d)},
    **{function: _TRANSPOSED for function in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)},
}
DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
ZERO_PADDING = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.Identity)  # Identity: no padding, where none is needed


def make_plain(layer: nn.Module) -> None:
    """Give a layer whose forward is its base class's call that class; in place, on a copy of the user's network.

    timm's ``Linear`` is one. A checkpoint can hold such a layer without the model's code. A class with more to it
    (other methods, submodules, hooks, another signature) is left alone: its network may use that.
    """
    kind = next(base for base in type(layer).__mro__ if base in LAYERS)
    has_more = any(True for _ in layer.children()) or layer._forward_hooks or layer._forward_pre_hooks
    if type(layer).__module__.startswith("torch.nn.") or parametrize.is_parametrized(layer) or has_more:
        return
    own = {name for base in type(layer).__mro__[: type(layer).__mro__.index(kind)] for name in vars(base)}
    has_methods = any(not name.startswith("__") and name not in ("forward", "_conv_forward") for name in own)
    signatures = [list(inspect.signature(each.forward).parameters) for each in (type(layer), kind)]
    if has_methods or len(signatures[0]) != len(signatures[1]):
        return
    example = torch.zeros(2, *_smallest(layer))
    if all(_is_base_call(layer, _traced(layer, example, training)) for training in (False, True)):
        layer.__class__ = kind


def scales_with_weight(layer: nn.Module, example: Tensor) -> bool:
    """Whether the layer is one product of its input, perhaps padded with zeros, with its weight and bias as they are.

    That is what folding relies on, and what makes a quantized weight the one that is computed with. A layer that
    standardizes its weight first (StdConv) is not so; one that pads in its own way (timm's Conv2dSame) is. example: an
    input of the layer, whose size its control flow may depend on.
    """
    if parametrize.type_before_parametrizations(layer) in LAYERS:
        return True
    return all(_is_product(layer, _traced(layer, example, training)) for training in (False, True))


def _traced(layer: nn.Module, example: Tensor, training: bool) -> fx.Graph | None:
    own = copy.deepcopy(layer).train(training)
    try:
        return Tracer((), [example.detach().to("cpu", torch.float32)], lambda _: False).trace(own.cpu().float())
    except Exception:  # a forward of someone else's can fail in any way, and is not understood then
        return None


def _is_base_call(layer: Any, graph: fx.Graph | None) -> bool:
    """Whether the graph is nothing but the product, with the arguments that the layer's attributes say."""
    if graph is None or not _is_product(layer, graph):
        return False
    used = [node for node in graph.nodes if node.op.startswith("call_")]
    arguments = _arguments(used[0]) if len(used) == 1 else {}
    if not arguments or getattr(arguments["input"], "op", "") != "placeholder":
        return False
    if getattr(layer, "padding_mode", "zeros") != "zeros" or (arguments["bias"] is None) != (layer.bias is None):
        return False
    names = [name for name in arguments if name not in ("input", "weight", "bias")]
    rank = len(getattr(layer, "kernel_size", ()))
    return all(_as_tuple(arguments[name], rank) == _as_tuple(getattr(layer, name), rank) for name in names)


def _is_product(layer: nn.Module, graph: fx.Graph | None) -> bool:
    """Whether the output is one product of the padded input with the parameters ``weight`` and ``bias``."""
    if graph is None:
        return False
    (output,) = graph.find_nodes(op="output")
    product = output.args[0]
    if not isinstance(product, fx.Node) or product.target not in PRODUCTS:
        return False
    arguments = _arguments(product)
    weight, bias = arguments["weight"], arguments["bias"]
    if getattr(weight, "target", None) != "weight" or (bias is not None and getattr(bias, "target", None) != "bias"):
        return False
    x = arguments["input"]
    while _pads_with_zeros(layer, x):
        x = x.args[0]
    return isinstance(x, fx.Node) and x.op == "placeholder" and list(graph.find_nodes(op="placeholder"))[0] is x


def _pads_with_zeros(layer: nn.Module, node: Any) -> bool:
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return isinstance(layer.get_submodule(str(node.target)), ZERO_PADDING)
    if node.target is not F.pad:
        return False
    given = dict(zip(("input", "pad", "mode", "value"), node.args)) | dict(node.kwargs)
    sizes = [n for n in node.all_input_nodes if n is not node.args[0]]
    is_zero = given.get("mode", "constant") == "constant" and not given.get("value")
    return bool(is_zero) and all(map(is_metadata, sizes))


def _arguments(product: fx.Node) -> dict[str, Any]:
    names = PRODUCTS.get(product.target, ())
    defaults = {name: DEFAULTS[name] for name in names if name in DEFAULTS}
    return {**defaults, **dict(zip(names, product.args)), **product.kwargs}


def _as_tuple(value: Any, rank: int) -> Any:
    return (value,) * rank if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else value


def _smallest(layer: Any) -> tuple[int, ...]:
    """The shape of a small input, without the batch."""
    if isinstance(layer, nn.Linear):
        return (layer.in_features,)
    return (layer.in_channels, *(2 * (d * (k - 1) + 1) for k, d in zip(layer.kernel_size, layer.dilation)))
