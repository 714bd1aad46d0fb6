"""The section of re-estimation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bnre_exp.config.choices import ActQuant, Recalibrate, ReestImages, ReestMethod
from bnre_exp.config.fields import MOST_BATCHES, check_fields, opt

MOST_SAMPLES = 10**9


@dataclass
class ReestConfig:
    """BN re-estimation."""

    group: ClassVar[str] = "reest"
    num_batches: int = opt(100, "batches of training data; 0: no re-estimation", ge=0, le=MOST_BATCHES)
    method: ReestMethod = opt(ReestMethod.batch_average, "batch_average, pooled or ema")
    momentum: float = opt(0.1, "weight of the newest batch, for ema", gt=0, le=1)
    num_samples: int | None = opt(
        None,
        "training images in place of num_batches; with the last batch cut, also 1 or 8; null: num_batches",
        ge=1,
        le=MOST_SAMPLES,
    )
    tolerance: float | None = opt(
        None,
        "stop when the standard errors of every channel's mean (in sd) and variance (relative) are below; such as 0.05",
        gt=0,
        le=1,
    )
    prior: int = opt(
        0, "samples that the old statistics count as, beside the new ones; 0: they are forgotten", ge=0, le=MOST_SAMPLES
    )
    passes: int = opt(
        1,
        "after the first, BNs see what the statistics of the pass before make of the layers before them",
        ge=1,
        le=100,
    )
    layers: list[str] = opt(factory=list, doc="names of BNs or patterns (*, ?): only these are re-estimated; []: all")
    augment: ReestImages = opt(
        ReestImages.eval, "images: eval (as evaluation sees them) or train (augmented, where dataset.augment is on)"
    )
    curve: list[int] = opt(factory=list, doc="numbers of batches after which the validation data are evaluated", ge=1)
    ablate: bool = opt(False, "evaluate the validation data with each BN re-estimated alone")
    act_quant: ActQuant = opt(
        ActQuant.auto, "activation quantizers meanwhile: frozen, bypassed; auto: bypassed without QAT"
    )
    recalibrate: Recalibrate = opt(
        Recalibrate.auto, "activation ranges are fitted anew afterwards: always, never; auto: without QAT"
    )

    def __post_init__(self) -> None:
        check_fields(self, self.group)
