"""A leaf module as JSON - its class and constructor arguments - and back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnre_exp.errors import UserError
from bnre_exp.export.checkpoint import allowed
from bnre_exp.export.checkpoint.bounds import FewCalls, check_arguments, check_bits
from bnre_exp.export.checkpoint.graph_json import JsonDict
from bnre_exp.export.checkpoint.value_json import decode_value, encode_value
from bnre_exp.quantsim.quantizers.codes import set_codes
from bnre_exp.quantsim.quantizers.quantizer import Dequantize
from bnre_exp.quantsim.tracing.trace import FollowTraining

_DEQUANTIZE_ARGS = ("bits", "ndim", "transposed", "groups", "in_channels", "per_channel", "dtype")
_FLAGS = ("transposed", "per_channel")
_CODE_DTYPES = (torch.int8, torch.int16, torch.int32)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe_module(module: nn.Module) -> JsonDict | None:
    """Class, constructor arguments and integer tensors, or None for a module that these cannot rebuild.

    It is rebuilt to find out: what a class keeps under other names than its constructor's, what was changed after
    construction, a hook or a parametrization of someone else's all end in None.
    """
    name = allowed.module_class_names().get(parametrize.type_before_parametrizations(module))
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    codes = describe_codes(module)
    if name is None or hooked or codes is None:
        return None
    try:
        description = {"type": name, "args": _constructor_args(module, allowed.module_classes()[name]), "codes": codes}
        rebuilt = build_module(description, module.state_dict())
    except Exception:  # every constructor refuses what it does not like in its own way
        return None
    return description if _alike(rebuilt, module) else None


def build_module(description: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The module in evaluation mode, holding the tensors of ``state`` themselves.

    It is constructed without memory or random numbers for its initial values. Raises ``UserError`` for a class outside
    the allow-list, and whatever torch raises for arguments or tensors that do not fit.
    """
    if description["type"] not in allowed.module_classes():
        raise UserError(f"the class {description['type']!r} is not on the list of those that a checkpoint may hold")
    args = {name: decode_value(value, {}) for name, value in description["args"].items()}
    check_arguments(description["type"], args, len(state))
    with torch.device("meta"), FewCalls(state):
        module = allowed.module_classes()[description["type"]](**args)
    if isinstance(module, FollowTraining) and module.function not in FollowTraining.FUNCTIONS:
        raise UserError(f"{module.function!r} is not a function that follows the mode")
    for name, spec in description["codes"].items():
        restore_codes(module, name, spec, state)
    module.load_state_dict(dict(state), strict=True, assign=True)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise UserError(f"it has tensors outside its state: {', '.join(left)}")
    return module.eval()


def _constructor_args(module: nn.Module, kind: type[nn.Module]) -> JsonDict:
    args: JsonDict = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name in ("self", "device", "dtype") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not hasattr(module, name) and parameter.default is not parameter.empty:
            continue  # whether the default was meant shows when the rebuilt module is compared
        value = getattr(module, name)
        if name == "bias" and not isinstance(value, bool):
            value = value is not None
        args[name] = encode_value(value)
    return args


def describe_codes(module: nn.Module) -> JsonDict | None:
    """Arguments of each Dequantize of the module, or None if anything else is parametrized."""
    codes: JsonDict = {}
    for path, owner in module.named_modules():
        if not isinstance(owner, parametrize.ParametrizationList):
            continue
        _, _, name = path.rpartition("parametrizations.")
        if path != f"parametrizations.{name}" or len(owner) != 1 or type(owner[0]) is not Dequantize:
            return None
        codes[name] = {key: encode_value(getattr(owner[0], key)) for key in _DEQUANTIZE_ARGS}
    return codes


def restore_codes(module: nn.Module, name: str, spec: JsonDict, state: Mapping[str, Tensor]) -> None:
    """Make ``module.<name>`` the integer codes and scale of ``state``. Raises ``UserError`` if they do not fit it."""
    codes, scale = state[f"parametrizations.{name}.original"], state[f"parametrizations.{name}.0.scale"]
    # Versions before 3 said neither granularity nor type.
    before = {"per_channel": scale.numel() > 1 or spec["ndim"] == 1, "dtype": scale.dtype}
    args = {**before, **{key: decode_value(value, {}) for key, value in spec.items()}}
    is_known = set(args) == set(_DEQUANTIZE_ARGS) and args["dtype"] in _DTYPES
    if name not in ("weight", "bias") or not is_known or codes.dtype not in _CODE_DTYPES:
        raise UserError(f"the integer codes of its {name} are damaged")
    check_bits(args["bits"])
    plain = getattr(module, name)
    if plain is None or codes.shape != plain.shape or not _is_layout(args, codes, scale):
        raise UserError(
            f"its {name} has codes of the shape {tuple(codes.shape)} and {scale.numel()} scales, which do not fit each "
            "other, or its class and arguments"
        )
    set_codes(module, name, codes, Dequantize(**args, scale=scale))


def _is_layout(args: JsonDict, codes: Tensor, scale: Tensor) -> bool:
    """Whether the product of codes and scale has the shape of the codes; found out without computing it."""
    ndim, groups, in_channels = counts = [args[key] for key in ("ndim", "groups", "in_channels")]
    if any(type(x) is not int or x < 1 for x in counts) or any(type(args[key]) is not bool for key in _FLAGS):
        return False
    if scale.dim() != 1 or not scale.is_floating_point() or ndim != codes.dim():
        return False
    if not args["per_channel"]:
        return scale.numel() == 1
    if ndim == 1 or not args["transposed"]:
        return scale.numel() == codes.shape[0]
    return codes.shape[0] == in_channels and in_channels % groups == 0 and scale.numel() == codes.shape[1] * groups


def _alike(rebuilt: nn.Module, module: nn.Module) -> bool:
    """Whether both have the same submodules, tensors and, as far as the rebuilt one has them, attributes."""
    first, second = dict(rebuilt.named_modules()), dict(module.named_modules())
    if first.keys() != second.keys() or rebuilt.state_dict().keys() != module.state_dict().keys():
        return False
    bookkeeping = vars(nn.Module()).keys()
    for name, ours in first.items():
        theirs = second[name]
        if parametrize.type_before_parametrizations(ours) is not parametrize.type_before_parametrizations(theirs):
            return False
        for key in vars(ours).keys() - bookkeeping:
            if not hasattr(theirs, key) or not _same(getattr(ours, key), getattr(theirs, key)):
                return False
    return True


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return bool(encode_value(a) == encode_value(b))
    except UserError:
        return False
