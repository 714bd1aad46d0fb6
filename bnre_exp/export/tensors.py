"""Tensors of a checkpoint: values in safetensors, and what that format does not keep in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bnre_exp.errors import UserError


def encode_tensors(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """The content of a safetensors file, and dtype, shape and memory layout of each tensor.

    Raises ``UserError`` for a tensor that safetensors cannot hold.
    """
    layouts: dict[str, dict[str, Any]] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
            raise UserError(
                f"the tensor {name!r} is a {type(tensor).__name__} of layout {tensor.layout}, not a dense one"
            )
        layouts[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        if is_dense(tensor.shape, tensor.stride()):
            layouts[name]["stride"] = list(tensor.stride())
        # Copies, since safetensors refuses tensors that share memory.
        plain[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).contiguous()
    try:
        return safetensors.torch.save(plain), layouts
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"safetensors cannot hold its tensors: {error}") from error


def decode_tensors(content: bytes, layouts: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors, in the memory layout in which they were. Raises ``UserError`` if anything does not fit."""
    try:
        found = safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"it is not a whole safetensors file ({error})") from error
    if found.keys() != layouts.keys():
        raise UserError(f"missing or unexpected tensors: {', '.join(sorted(found.keys() ^ layouts.keys()))}")
    return {name: _with_layout(name, found[name], layouts[name]) for name in layouts}


def _with_layout(name: str, plain: Tensor, layout: Mapping[str, Any]) -> Tensor:
    shape, dtype = tuple(layout["shape"]), layout["dtype"]
    if tuple(plain.shape) != shape or str(plain.dtype) != f"torch.{dtype}":
        raise UserError(f"the tensor {name!r} is {plain.dtype} {tuple(plain.shape)}, expected {dtype} {shape}")
    stride = layout.get("stride", plain.stride())
    if not is_dense(shape, stride):
        raise UserError(f"the tensor {name!r} cannot have the strides {stride}")
    # Memory of torch's own: what safetensors returns need not be aligned, which kernels may notice.
    return torch.empty_strided(shape, tuple(stride), dtype=plain.dtype, device="cpu").copy_(plain)


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements fill a block of memory without gaps or overlaps, in any order of the axes."""
    if len(shape) != len(stride) or not all(type(step) is int and 0 <= step < 2**62 for step in stride):
        return False
    if 0 in shape:
        return True
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape) if size > 1):
        if step != expected:
            return False
        expected *= size
    return True
