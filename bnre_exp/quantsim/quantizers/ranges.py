"""Range estimators: the scale (and zero point) that represents given values best on an integer grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.error_bounds import Histogram, error_bounds, histogram

COARSE = torch.linspace(0.05, 1.0, 20)  # fractions of the largest value that the MSE search tries first
REFINEMENTS = 8
BLOCK = 2**15 - 1  # values of weights searched at once; below the number from which torch uses several threads
SQUARABLE = 50  # 2**-50 to 2**50: float32 holds the squares of such values and of their errors


def fit_symmetric_scale(
    rows: Tensor, quant_max: int, estimator: str = "mse", percentile: float = 99.99, quant_min: int | None = None
) -> Tensor:
    """Scale of a grid of signed codes ``[quant_min, quant_max]``, with real zero at code 0, for each row.

    rows: ``[C, n]``. quant_min: below 0; None: ``-quant_max``. Returns ``[C]``, positive. A row of zeros gets the
    largest scale of the others (1 / quant_max where all are zero): its codes are 0 at any scale, and a tiny one would
    be useless to a bias on the same grid.
    Raises ``UserError`` for values that are not finite.
    """
    dtype, quant_min = rows.dtype, -quant_max if quant_min is None else quant_min
    rows = rows.detach().to(torch.promote_types(dtype, torch.float32))  # half precision does not hold squared errors
    if not bool(rows.isfinite().all()):
        raise UserError("fit_symmetric_scale: values are not finite.")
    needed = torch.where(rows < 0, rows / quant_min, rows / quant_max)  # the scale from which a value is not clipped
    scale = needed.amax(dim=1)
    if estimator == "percentile":
        kept = max(1, round(rows.shape[1] * percentile / 100))
        inner = needed.kthvalue(kept, dim=1).values
        scale = torch.where(inner > 0, inner, scale)
    fallback = scale.max() if bool((scale > 0).any()) else torch.ones_like(scale[0]) / quant_max
    dead = scale <= 0
    scale = torch.where(dead, fallback, scale)
    if estimator == "mse":
        power = _power_to_square(rows.abs().amax(dim=1))
        found = _mse_symmetric(rows * power[:, None], scale * power, quant_min, quant_max) / power
        scale = torch.where(dead, scale, found)
    return scale.to(dtype)


def _power_to_square(largest: Tensor) -> Tensor:
    """1, or the power of two that brings values whose squares overflow or vanish near 1: all errors would be equal."""
    exponent = torch.frexp(largest).exponent
    return torch.where(exponent.abs() > SQUARABLE, torch.exp2(-exponent.clamp(-120, 120).to(largest.dtype)), 1)


def _mse_symmetric(rows: Tensor, full_scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """A coarse search over fractions of the full range, then alternating least squares: for fixed codes q the best
    scale is <w, q> / <q, q>. Keeps the best scale of each row seen on the way.

    Rows are searched in blocks that stay in the processor's cache. None is of one row, of which a sum over several
    threads would add up in another order.
    """
    blocks = min(max(1, -(-rows.numel() // BLOCK)), max(1, len(rows) // 2))
    parts = zip(rows.tensor_split(blocks), full_scale.tensor_split(blocks))
    return torch.cat([_mse_of_block(part, scale, quant_min, quant_max) for part, scale in parts])


def _mse_of_block(rows: Tensor, full_scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    best_scale, best_error = full_scale.clone(), torch.full_like(full_scale, torch.inf)

    def codes_of(rows: Tensor, scale: Tensor) -> Tensor:
        return (rows / scale[:, None]).round_().clamp_(quant_min, quant_max)

    def error_of(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return (codes * scale[:, None]).sub_(rows).square_().sum(dim=1)

    for fraction in COARSE.tolist():
        scale = full_scale * fraction
        error = error_of(rows, codes_of(rows, scale), scale)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    moving, codes = torch.arange(len(rows), device=rows.device), codes_of(rows, best_scale)
    for _ in range(REFINEMENTS):
        refined = (rows * codes).sum(dim=1) / codes.square().sum(dim=1).clamp_min(1)
        refined = torch.where(refined > 0, refined, best_scale[moving])
        codes = codes_of(rows, refined)
        error = error_of(rows, codes, refined)
        better = (error < best_error[moving]).nonzero()[:, 0]
        if not len(better):  # a row whose scale did not get better would only be refined to the same one again
            break
        moving = moving[better]
        best_scale[moving], best_error[moving] = refined[better], error[better]
        rows, codes = rows[better], codes[better]
    return best_scale


def fit_activation_range(
    values: Tensor,
    low: float,
    high: float,
    bits: int,
    unsigned: bool,
    estimator: str = "mse",
    percentile: float = 99.99,
) -> tuple[float, float]:
    """The range ``(low, high)`` that a grid of 2^bits levels should cover; it always holds 0.

    values: a sample, any shape; low, high: the extremes of all values seen. An all-zero tensor gets ``(0, 1)``. Raises
    ``UserError`` for extremes that are not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"fit_activation_range: the extremes {low} and {high} are not finite.")
    low, high = (0.0 if unsigned else min(low, 0.0)), max(high, 0.0)
    if estimator == "percentile":
        ordered = values.flatten().sort().values
        outside = round(ordered.numel() * (1 - percentile / 100))
        low, high = max(low, min(float(ordered[outside]), 0.0)), min(high, max(float(ordered[-1 - outside]), 0.0))
    if high - low <= 0:
        return 0.0, 1.0
    if estimator == "mse":
        power = float(_power_to_square(torch.tensor(max(-low, high), dtype=torch.float64)))
        values, low, high = values.flatten() * power, low * power, high * power
        error = partial(_range_error, values, bits=bits)
        known = histogram(values) if bits <= 8 and values.numel() else None
        for _ in range(2):  # coordinate descent: the upper end for a given lower one, and back
            high *= _best_fraction(low, high, True, error, known, bits) if high else 1
            low *= _best_fraction(low, high, False, error, known, bits) if low else 1
        low, high = low / power, high / power
    return low, high


def _best_fraction(
    low: float, high: float, is_upper: bool, error: Callable[[float, float], float], known: Histogram | None, bits: int
) -> float:
    """The fraction of an end of the range with the smallest error: coarse, then fine around the best."""

    def range_of(part: float) -> tuple[float, float]:
        return (low, high * part) if is_upper else (low * part, high)

    def best_of(parts: list[float]) -> float:
        if known is not None:  # what certainly has a larger error than another is left out
            least, most = error_bounds(known, [affine_grid(*range_of(part), bits) for part in parts], 2**bits)
            parts = [part for part, bound in zip(parts, least) if bound <= most.min()]
        return min(parts, key=lambda part: error(*range_of(part))) if len(parts) > 1 else parts[0]

    best = best_of(COARSE.tolist())
    return best_of([best + step * 0.01 for step in range(-4, 5) if 0 < best + step * 0.01 <= 1])


def _range_error(values: Tensor, low: float, high: float, bits: int) -> float:
    scale, zero_point = affine_grid(low, high, bits)
    codes = (values / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    return float((codes.sub_(zero_point).mul_(scale) - values).square_().mean())


def affine_grid(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and integer zero point of the grid ``0 .. 2^bits - 1`` over ``[low, high]``; 0 lies on the grid exactly."""
    levels = 2**bits - 1
    scale = (high - low) / levels
    return scale, min(max(round(-low / scale), 0), levels)
