"""What to quantize, and how finely: the library's description of a quantization scheme."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bnre_exp.errors import UserError

ESTIMATORS = ("mse", "minmax", "percentile")
NARROW, FULL = "narrow", "full"  # grids of weights


def _check_bits(name: str, bits: int | None) -> None:
    if bits is not None and not 2 <= bits <= 16:
        raise UserError(f"{name}={bits}: expected 2 to 16 bits, or None for no quantization.")


@dataclass(frozen=True)
class LayerRule:
    """What differs for the layers and operations whose name matches ``pattern`` (``*`` and ``?`` as in file names).

    weight_bits, act_bits: 2 to 16, None: as the scheme. off: neither weights nor output are quantized.
    """

    pattern: str
    weight_bits: int | None = None
    act_bits: int | None = None
    off: bool = False

    def __post_init__(self) -> None:
        _check_bits(f"weight_bits of {self.pattern!r}", self.weight_bits)
        _check_bits(f"act_bits of {self.pattern!r}", self.act_bits)

    def matches(self, names: Iterable[str]) -> bool:
        """Whether any of the names matches."""
        return any(fnmatchcase(name, self.pattern) for name in names)


@dataclass(frozen=True)
class QuantScheme:
    """A quantization scheme.

    weight_bits, act_bits: 2 to 16; None leaves weights or activations in floating point.
    per_channel: one weight scale per output channel, else one per tensor.
    range_learning: training learns the scales (LSQ); otherwise they stay as calibrated.
    first_last_bits: bits of the first and the last layer (their weights and inputs, and the network's output); None: as
    the others.
    overrides: exceptions by name, the last match wins.
    weight_grid: "narrow", the codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1; or "full", which has -2^(bits-1) as well,
    and its mirror image in a channel whose BN has a negative gamma (with one scale per channel).
    weight_range, act_range: range estimators, "mse", "minmax" or "percentile" (which keeps ``percentile`` percent).

    Raises ``UserError`` for values out of range.
    """

    weight_bits: int | None = 8
    act_bits: int | None = 8
    per_channel: bool = True
    range_learning: bool = True
    first_last_bits: int | None = None
    overrides: tuple[LayerRule, ...] = ()
    weight_grid: str = NARROW
    weight_range: str = "mse"
    act_range: str = "mse"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits", "first_last_bits"):
            _check_bits(name, getattr(self, name))
        if self.weight_grid not in (NARROW, FULL):
            raise UserError(f"weight_grid={self.weight_grid!r}: expected {NARROW} or {FULL}.")
        for name in ("weight_range", "act_range"):
            if getattr(self, name) not in ESTIMATORS:
                raise UserError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(ESTIMATORS)}.")
        if not 50 < self.percentile <= 100:
            raise UserError(f"percentile={self.percentile}: expected a percentage in (50, 100].")

    def rule(self, names: Iterable[str]) -> LayerRule | None:
        """The override for something known under these names, if any."""
        names = tuple(names)
        matching = [rule for rule in self.overrides if rule.matches(names)]
        return matching[-1] if matching else None
