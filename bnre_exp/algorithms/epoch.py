"""What one epoch of a training gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """One epoch: index from 1, mean training loss, learning rate at its end, seconds of training, and the metrics of
    the validation data by name, also as attributes: ``epoch.val_loss`` (None without validation data). shares: parts of
    the quantized weights that oscillate, and that are frozen, by name (None where nothing follows them)."""

    epoch: int
    loss: float
    lr: float
    seconds: float
    validation: Mapping[str, float] | None = None
    shares: Mapping[str, float] | None = None

    def __getattr__(self, name: str) -> float | None:
        metric = name.removeprefix("val_")
        metrics = self.__dict__.get("validation")
        if metric == name or (metrics is not None and metric not in metrics):
            raise AttributeError(f"an epoch has no {name!r}")
        return None if metrics is None else metrics[metric]

    def as_json(self) -> dict[str, Any]:
        """All of it as one flat dict, ``val_…`` for the validation data's."""
        own = {name: getattr(self, name) for name in ("epoch", "loss", "lr", "seconds")}
        shares = {} if self.shares is None else {"shares": dict(self.shares)}
        return {**own, **shares, **{f"val_{name}": value for name, value in (self.validation or {}).items()}}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Epoch:
        """The inverse of :meth:`as_json`."""
        scores = {name.removeprefix("val_"): v for name, v in values.items() if name.startswith("val_")}
        own = {name: value for name, value in values.items() if not name.startswith("val_")}
        return Epoch(**own, validation=scores if any(v is not None for v in scores.values()) else None)
