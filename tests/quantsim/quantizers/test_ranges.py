"""Range searches: that what they leave out changes no range, by comparison with searches that leave nothing out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnre_exp.quantsim.quantizers import error_bounds, observer, ranges
from bnre_exp.quantsim.quantizers.ranges import COARSE, affine_grid, fit_activation_range, fit_symmetric_scale

SAMPLES = {
    "normal": lambda x: x,
    "relu": torch.relu,
    "relu6": lambda x: (4 * x).clamp(0, 6),
    "negative": lambda x: -x.abs(),
    "pixels": lambda x: ((x.abs() * 80).clamp(0, 255).round() / 255 - 0.305) / 0.324,
    "on the grid": lambda x: (4 * x).round().clamp(-8, 7) / 8,
    "outlier": lambda x: torch.cat([x[1:] * 1e-3, x.new_tensor([5.0])]),
    "heavy": lambda x: x**5,
    "tiny": lambda x: x * 1e-20,
    "huge": lambda x: x * 1e20,
    "one value": lambda x: torch.full_like(x, -0.3),
}


def every_error(values: Tensor, low: float, high: float, bits: int) -> tuple[float, float]:
    """The search of :func:`fit_activation_range` over all candidates."""
    power = float(ranges._power_to_square(torch.tensor(max(-low, high), dtype=torch.float64)))
    values, low, high = values * power, low * power, high * power

    def best(low: float, high: float, is_upper: bool) -> float:
        def error(part: float) -> float:
            ends = (low, high * part) if is_upper else (low * part, high)
            scale, zero_point = affine_grid(*ends, bits)
            codes = (values / scale).round().add(zero_point).clamp(0, 2**bits - 1)
            return float(((codes - zero_point) * scale - values).square().mean())

        coarse = min(COARSE.tolist(), key=error)
        return min([coarse + step * 0.01 for step in range(-4, 5) if 0 < coarse + step * 0.01 <= 1], key=error)

    for _ in range(2):
        high *= best(low, high, True)
        low *= best(low, high, False)
    return low / power, high / power


@pytest.mark.parametrize("bits", [2, 4, 8, 9])
@pytest.mark.parametrize("kind", SAMPLES)
def test_the_range_of_an_activation_is_that_of_a_search_over_all_candidates(kind, bits):
    for count in (5, 3000):
        values = SAMPLES[kind](torch.randn(count, generator=torch.Generator().manual_seed(count + bits)))
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        expected = every_error(values, low, high, bits) if low < high else (0.0, 1.0)
        assert fit_activation_range(values, low, high, bits, low >= 0) == expected


@pytest.mark.parametrize("kind", SAMPLES)
def test_bounds_hold_the_error_of_every_grid(kind):
    values = SAMPLES[kind](torch.randn(3000, generator=torch.Generator().manual_seed(0)))
    known = error_bounds.histogram(values.double())
    if kind == "one value":
        assert known is None
        return
    reach = float(values.abs().max())
    grids = [affine_grid(-reach * low, reach * high, 4) for low in (0.0, 0.1, 1.0) for high in (0.05, 0.3, 1.0)]
    lowest, highest = error_bounds.error_bounds(known, grids, 2**4)
    for (scale, zero_point), low, high in zip(grids, lowest, highest):
        codes = (values.double() / scale).round().add(zero_point).clamp(0, 15)
        error = float(((codes - zero_point) * scale - values.double()).square().sum())
        assert low <= error <= high and high - low <= 0.05 * high + 1e-9 * known.energy


def test_most_candidates_are_left_out(monkeypatch):
    calls, error = [], ranges._range_error
    monkeypatch.setattr(ranges, "_range_error", lambda *of, **how: calls.append(of) or error(*of, **how))
    values = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    fit_activation_range(values, float(values.min()), float(values.max()), 8, False)
    assert len(calls) < 20  # of 116


def every_refinement(rows: Tensor, full_scale: Tensor, quant_max: int) -> Tensor:
    """The search of :func:`fit_symmetric_scale`, all rows at once and to the last refinement."""
    best_scale, best_error = full_scale.clone(), torch.full_like(full_scale, torch.inf)

    def try_scale(scale: Tensor) -> Tensor:
        codes = (rows / scale[:, None]).round_().clamp_(-quant_max, quant_max)
        error = (codes * scale[:, None] - rows).square_().sum(dim=1)
        better = error < best_error
        best_scale[better], best_error[better] = scale[better], error[better]
        return codes

    for fraction in COARSE.tolist():
        try_scale(full_scale * fraction)
    for _ in range(ranges.REFINEMENTS):
        codes = try_scale(best_scale.clone())
        refined = (rows * codes).sum(dim=1) / codes.square().sum(dim=1).clamp_min(1)
        try_scale(torch.where(refined > 0, refined, best_scale))
    return best_scale


@pytest.mark.parametrize("quant_max", [1, 7, 127])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (3, 40_000), (7, 9), (130, 576)])
def test_scales_of_weights_are_those_of_a_search_in_one_block_to_the_last_refinement(shape, quant_max):
    generator = torch.Generator().manual_seed(shape[1])
    rows = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) ** 4
    full_scale = rows.abs().amax(dim=1) / quant_max
    assert torch.equal(fit_symmetric_scale(rows, quant_max), every_refinement(rows, full_scale, quant_max))


def observed(batches, **how):
    seen = observer.RangeObserver(2, samples=2048, **how)
    for batch in batches:
        seen.observe(batch)
    return torch.cat(seen.samples), seen.low, seen.high


def test_observers_that_share_draws_and_memory_formats_see_the_same_sample():
    generator, draws = torch.Generator().manual_seed(1), {}
    first, second = torch.randn(4, 3, 17, 13, generator=generator), torch.randn(5, 3, 17, 13, generator=generator)
    for batches in ([first, second], [first, first], [second, first]):
        expected, index = [], torch.Generator().manual_seed(0)
        for batch in batches:
            expected.append(batch.flatten()[torch.randint(batch.numel(), (1024,), generator=index)])
        for of in (batches, [batch.contiguous(memory_format=torch.channels_last) for batch in batches]):
            for how in ({}, {"draws": draws}):
                sample, low, high = observed(of, **how)
                assert torch.equal(sample, torch.cat(expected))
                assert low == min(map(float, map(torch.min, batches)))
                assert high == max(map(float, map(torch.max, batches)))
