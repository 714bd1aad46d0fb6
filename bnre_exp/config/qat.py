"""The config group ``qat``: how the simulation is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bnre_exp.config.choices import Optimizer, Oscillation, QatBn, QatPrepare, QatValidate, Schedule
from bnre_exp.config.fields import MOST_BATCHES, check_fields, opt
from bnre_exp.config.sections import MOST_EPOCHS, MOST_RATE


@dataclass
class QatConfig:
    """Quantization-aware training."""

    group: ClassVar[str] = "qat"
    epochs: int = opt(2, "passes over the training data; 0: no QAT (PTQ)", ge=0, le=MOST_EPOCHS)
    prepare: QatPrepare = opt(
        QatPrepare.auto,
        "before the first step: reestimate (BN statistics from calib_batches, then ranges), calibrate (ranges), none; "
        "auto: reestimate, with reest.num_batches=0 calibrate",
    )
    lr: float = opt(0.01, "peak learning rate", gt=0, le=MOST_RATE)
    optimizer: Optimizer = opt(Optimizer.sgd, "sgd or adamw")
    momentum: float = opt(0.9, "of SGD", ge=0, lt=1)
    weight_decay: float = opt(
        1e-4, "L2 penalty on weights; never on BN parameters, biases or scales", ge=0, le=MOST_RATE
    )
    schedule: Schedule = opt(Schedule.cosine, "one_cycle, cosine or constant")
    label_smoothing: float = opt(0.0, "fraction of the target spread over all classes", ge=0, lt=1)
    bn: QatBn = opt(
        QatBn.train,
        "train: BNs normalize by the batch and update their statistics; frozen: by the statistics of the start, which "
        "stay",
    )
    freeze_bn_epoch: int | None = opt(
        None, "epoch, counted from 1, from which on they are frozen; null: as bn says", ge=1, le=MOST_EPOCHS
    )
    bn_momentum: float | None = opt(
        None, "weight of the newest batch in BN statistics, in QAT alone; null: the network's own", gt=0, le=1
    )
    validate: QatValidate = opt(
        QatValidate.as_is,
        "validation figures of every epoch are of the network as_is, or reestimated: with statistics of its own from "
        "validate_batches, which is undone",
    )
    validate_batches: int = opt(50, "batches of training data for that", ge=1, le=MOST_BATCHES)
    oscillation: Oscillation = opt(
        Oscillation.none, "against weights that oscillate between two integers: none, dampening or freezing"
    )
    oscillation_momentum: float = opt(
        0.01, "weight of the newest step in the frequency of oscillations and in the average of integers", gt=0, le=1
    )
    dampening: float = opt(
        0.1, "dampening: factor of the squared distance of weights to their integers at the end; 0 at the start", ge=0,
        le=MOST_RATE,
    )  # fmt: skip
    freeze_from: float = opt(0.1, "freezing: frequency above which a weight is frozen, at the start", ge=0, le=1)
    freeze_to: float = opt(0.01, "the same at the end; between the two by a cosine", ge=0, le=1)
    ema_decay: float | None = opt(
        None, "QAT ends with the moving average of weights and scales of this decay; null: with the last", gt=0, lt=1
    )

    def __post_init__(self) -> None:
        check_fields(self, self.group)
