"""A plain ONNX model and what is quantized in it, as records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Grid of a quantized activation: ``(code - zero_point) * scale``, code from 0 to 2^bits - 1.

    name: of the tensor in the model.
    """

    name: str
    scale: float
    zero_point: int
    bits: int


@dataclass(frozen=True)
class Codes:
    """A quantized weight or bias: ``codes * scale``.

    name: of the initializer in the model; layer: the module it belongs to; codes: signed integers, of the initializer's
    shape; scale: float32 ``[C]`` along ``axis``, or ``[1]`` with axis None; bits: of the codes.
    """

    name: str
    layer: str
    codes: np.ndarray
    scale: np.ndarray
    axis: int | None
    bits: int


@dataclass(frozen=True)
class Plain:
    """model: an ``onnx_ir.Model`` that computes in float32, with weights that are codes times scale. A tensor that has
    a grid is not rounded in it."""

    model: Any
    grids: tuple[Grid, ...]
    parameters: tuple[Codes, ...]


def along(values: np.ndarray, ndim: int, axis: int | None) -> np.ndarray:
    """A vector ``[C]`` so that it broadcasts along an axis of a tensor with ``ndim`` axes; ``[1]`` with axis None."""
    shape = [1] * ndim
    if axis is not None:
        shape[axis] = -1
    return values.reshape(shape)


def dequantized(codes: Codes) -> np.ndarray:
    """Codes times scale, float32, of the shape of the codes."""
    scale = along(codes.scale.astype(np.float32), codes.codes.ndim, codes.axis)
    product: np.ndarray = codes.codes.astype(np.float32) * scale
    return product
