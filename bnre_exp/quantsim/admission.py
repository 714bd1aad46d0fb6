"""What ``quantize`` takes: a network out of its wrappers. All else is refused in one message, before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, LAYERS
from bnre_exp.quantsim.quantizers.quantizer import ActivationQuantizer, Dequantize, WeightQuantizer
from bnre_exp.quantsim.quantizers.state import HALF
from bnre_exp.quantsim.wrappers import copied, unwrapped, wrapped

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
OURS = (ActivationQuantizer, WeightQuantizer, Dequantize)
NORM_HOOKS = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}


def admitted(model: Any, leaf_modules: Collection[str] = ()) -> tuple[nn.Module, tuple[str, ...]]:
    """The network to trace, and notes on what it was taken out of; ``model`` is unchanged.

    Wrappers that run a network in parallel, compiled or averaged are left out, within the network too (in a copy).
    Raises ``UserError`` for what is no ``nn.Module``, is a simulation, cannot be traced or has no values, and names
    the module whose tensors are pruned, parametrized, computed by hooks, lazy or not to be copied.
    """
    notes = []
    while (inner := wrapped(model)) is not None:
        notes.append(_note("the network", model))
        model = inner
    refuse_kind(model, "quantize")
    within = {name: module for name, module in model.named_modules() if wrapped(module) is not None}
    if within:
        notes += [_note(name, module) for name, module in within.items()]
        model = _unwrapped_within(copied(model))
    _refuse_ours(model)
    _refuse_half(model)
    for name, module in model.named_modules():
        _refuse_kind_of_module(name, module)
        _refuse_hooks(name, module)
        _refuse_tensors(name, module)
    for name, module in _looked_into("", model, set(leaf_modules)):
        _refuse_parametrized(name, module)
    return model, tuple(notes)


def inputs_of(example_input: Any) -> tuple[Tensor, ...]:
    """The example as a tuple of ordinary tensors. Raises ``UserError`` if it is anything else than tensors."""
    given = (example_input,) if isinstance(example_input, Tensor) else example_input
    inputs = tuple(given) if isinstance(given, (tuple, list)) else ()
    if not inputs or not all(isinstance(x, Tensor) and x.dim() > 0 and len(x) for x in inputs):
        raise UserError("example_input: expected a tensor [N, ...] with N >= 1, or a non-empty tuple of tensors.")
    if any(x.is_meta for x in inputs):
        raise UserError("example_input: a tensor on the meta device has no values; expected one with values.")
    return tuple(x.clone() if x.is_inference() else x for x in inputs)


def _note(name: str, wrapper: Any) -> str:
    return f"{name} is taken out of {type(wrapper).__name__}"


def _unwrapped_within(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            module._modules[name] = unwrapped(child)
    return model if all(wrapped(m) is None for m in model.modules()) else _unwrapped_within(model)


def refuse_kind(model: Any, what_for: str) -> None:
    """Raise ``UserError`` for anything but an ``nn.Module``."""
    if isinstance(model, nn.Module):
        return
    if type(model).__name__ == "ExportedProgram":
        raise UserError(_exported("This"))
    hint = " (call the function that builds it)" if callable(model) else ""
    raise UserError(f"{what_for}: expected a network, a torch.nn.Module, got {type(model).__name__}{hint}.")


def refuse_inference(tensor: Tensor, what: str) -> None:
    """Raise ``UserError`` for a tensor that torch lets nobody change here. what: begins the message."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise UserError(
            f"{what} were made under torch.inference_mode() and cannot be changed outside of it; take a copy.deepcopy "
            "of the network, or call this under inference_mode, too."
        )


def is_exported(module: nn.Module) -> bool:
    """Whether it is a graph of aten operations, as torch.export gives."""
    if not isinstance(module, fx.GraphModule):
        return False
    return any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)


def _exported(what: str) -> str:
    return (
        f"{what} is a program of torch.export: its layers and batch norms are operations (aten.conv2d, "
        "aten.batch_norm), not modules, and are not known here. Give the nn.Module that was exported."
    )


def _refuse_ours(model: nn.Module) -> None:
    ours = {name: type(module) for name, module in model.named_modules() if isinstance(module, OURS)}
    if not ours:
        return
    folded = WeightQuantizer not in ours.values() and Dequantize in ours.values()
    folded = folded or "fold_report" in getattr(model, "meta", {})
    what = "folded network (of fold_batch_norms)" if folded else "quantization simulation (of quantize)"
    raise UserError(
        f"quantize: this is, or holds, a {what} already, as {next(iter(ours))} shows. Give the floating-point network "
        "that it was made from; another scheme needs a new simulation."
    )


def _refuse_half(model: nn.Module) -> None:
    """Raise ``UserError`` for a network in half precision, whose own rounding is as coarse as that to 8 bits."""
    bns = [(name, module) for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
    statistics = [pair for name, bn in bns for pair in bn.named_buffers(name)]  # another buffer may be half: a table
    for name, tensor in (*model.named_parameters(), *statistics):
        if tensor.dtype in HALF:
            raise UserError(
                f"The network is in half precision ({name} is {str(tensor.dtype).removeprefix('torch.')}), in which "
                "ranges cannot be fitted; give model.float(). Training may still compute in bfloat16, under autocast: "
                "train(..., precision='bfloat16'), in a job runtime.precision=bfloat16."
            )


def _refuse_kind_of_module(name: str, module: nn.Module) -> None:
    what = f"The module {name}" if name else "The network"
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError(f"{what} is TorchScript, which cannot be traced; give the nn.Module that it was compiled from.")
    if type(module).__name__ == "FullyShardedDataParallel":
        raise UserError(f"{what} is sharded (FullyShardedDataParallel); give the whole network, loaded in one process.")
    if is_exported(module):
        raise UserError(_exported(what))


def _refuse_tensors(name: str, module: nn.Module) -> None:
    """Tensors that are lazy, without values, of a shard, or that cannot be copied."""
    for key, tensor in _tensors(module):
        full = f"{name}.{key}" if name else key
        if is_lazy(tensor):
            raise UserError(
                f"{full} has no shape yet: a lazy module gets it from its first batch; run the network once."
            )
        if tensor.is_meta:
            raise UserError(
                f"{full} is on the meta device and has no values; load the weights first (to_empty, assign)."
            )
        if hasattr(tensor, "full_tensor"):
            raise UserError(f"{full} is a shard (DTensor); give the whole network, loaded in one process.")
        if not tensor.is_leaf:
            raise UserError(
                f"{full} is computed from tensors with gradients (it has a grad_fn), so that the network cannot be "
                "copied; keep it detached: x.detach(), or a property that computes it."
            )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    held = {**vars(module), **module._parameters, **module._buffers}
    for key, value in held.items():
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{key}[{i}]", item) for i, item in enumerate(value) if isinstance(item, Tensor))
        elif isinstance(value, dict) and not key.startswith("_"):
            yield from ((f"{key}[{i!r}]", item) for i, item in value.items() if isinstance(item, Tensor))


def _refuse_hooks(name: str, module: nn.Module) -> None:
    """Pruning and the old weight_norm and spectral_norm compute a tensor in a hook, where nothing can quantize it."""
    for hook in module._forward_pre_hooks.values():
        kind = type(hook).__name__ if type(hook).__module__.startswith("torch.nn.utils.") else ""
        if isinstance(hook, BasePruningMethod):
            tensor = hook._tensor_name
            what, way_out = "prune", f"torch.nn.utils.prune.remove(layer, {tensor!r})"
        elif kind in NORM_HOOKS:
            tensor, what = getattr(hook, "name", "weight"), NORM_HOOKS[kind]
            way_out = f"torch.nn.utils.remove_{what}(layer)"
        else:
            continue
        raise UserError(
            f"The {tensor} of {name or 'the network'} is computed by torch.nn.utils.{what} at every call; make it a "
            f"plain {tensor} first: {way_out}."
        )


def _refuse_parametrized(name: str, module: Any) -> None:
    """Folding writes weights and biases of layers, and reads those of batch norms."""
    chains: Any = getattr(module, "parametrizations", None)
    if isinstance(module, (*LAYERS, *BATCH_NORMS)) and parametrize.is_parametrized(module):
        tensor, chain = next(iter(chains.items()))
        raise UserError(
            f"The {tensor} of {name or 'the network'} has a parametrization already ({chain[0]}); make it a plain "
            f"{tensor} first: torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r}). (Or keep the "
            "module that holds the layer whole, with leaf_modules.)"
        )


def _looked_into(name: str, module: nn.Module, leaves: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """The module and those in it that tracing looks at, with their names."""
    if {name, type(module).__name__} & leaves:
        return
    yield name, module
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, CONTAINERS):
        return
    for child_name, child in module.named_children():
        yield from _looked_into(f"{name}.{child_name}" if name else child_name, child, leaves)
