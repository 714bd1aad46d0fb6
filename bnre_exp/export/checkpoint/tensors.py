"""Tensors of a checkpoint: values in safetensors, and what that format does not keep in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bnre_exp.errors import UserError


def encode_tensors(tensors: Mapping[str, Tensor], bits: Mapping[str, int]) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """The content of a safetensors file, and dtype, shape and memory layout of each tensor.

    bits: of those that are integer codes; these are packed where their type has more. Raises ``UserError`` for a tensor
    that safetensors cannot hold.
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
        if name in bits and bits[name] < 8 * tensor.element_size():
            layouts[name]["bits"] = bits[name]
            plain[name] = pack(plain[name], bits[name])
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


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed integer codes as a stream of ``bits`` bits each, uint8 ``[ceil(numel * bits / 8)]``.

    Codes come in the order of a contiguous tensor, in two's complement, least significant bit first, two 4-bit codes a
    byte; what is left of the last byte is zero.
    """
    wide = codes.numpy().ravel().astype("<i2").view(np.uint8).reshape(-1, 2)
    table = np.unpackbits(wide, axis=1, bitorder="little")[:, :bits]
    return torch.from_numpy(np.packbits(table.reshape(-1), bitorder="little"))


def unpack(stream: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack`. Raises ``UserError`` if the stream is not as long as it must be."""
    count = math.prod(shape)
    if stream.dtype != torch.uint8 or stream.shape != (-(-count * bits // 8),):
        raise UserError(f"{stream.numel()} packed bytes do not hold {count} codes of {bits} bits")
    table = np.unpackbits(stream.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    signed = np.concatenate([table, np.repeat(table[:, -1:], 16 - bits, axis=1)], axis=1)
    codes = np.packbits(signed, axis=1, bitorder="little").view("<i2").reshape(shape)
    return torch.from_numpy(codes.astype(np.int16)).to(dtype)


def _with_layout(name: str, plain: Tensor, layout: Mapping[str, Any]) -> Tensor:
    shape, dtype = tuple(layout["shape"]), layout["dtype"]
    if "bits" in layout:
        sizes = {"int8": 8, "int16": 16}
        if (
            type(layout["bits"]) is not int
            or not 2 <= layout["bits"] < sizes.get(dtype, 0)
            or min(shape, default=0) < 0
        ):
            raise UserError(f"the tensor {name!r} cannot be {dtype} {shape} of {layout['bits']} bits")
        plain = unpack(plain, layout["bits"], shape, getattr(torch, dtype))
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
