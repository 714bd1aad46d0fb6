"""Settings that are one of a few words."""

from __future__ import annotations

from enum import Enum


class Optimizer(Enum):
    """Optimizers of the training loop."""

    sgd = "sgd"
    adamw = "adamw"


class Schedule(Enum):
    """Learning-rate schedules, stepped every batch."""

    one_cycle = "one_cycle"
    cosine = "cosine"
    constant = "constant"


class RangeEstimator(Enum):
    """How a quantization range is fitted to data."""

    mse = "mse"
    minmax = "minmax"
    percentile = "percentile"


class WeightGrid(Enum):
    """Which codes weights have."""

    narrow = "narrow"
    full = "full"


class QatPrepare(Enum):
    """What is done before the first step of QAT."""

    auto = "auto"
    reestimate = "reestimate"
    calibrate = "calibrate"
    none = "none"


class QatBn(Enum):
    """What batch norms do with their statistics in QAT."""

    train = "train"
    frozen = "frozen"


class QatValidate(Enum):
    """Which statistics of batch norms the validation figures of QAT's epochs are of."""

    as_is = "as_is"
    reestimated = "reestimated"


class Oscillation(Enum):
    """What is done in QAT against weights that oscillate between two integers."""

    none = "none"
    dampening = "dampening"
    freezing = "freezing"


class ReestMethod(Enum):
    """Estimators of the BN statistics over several batches."""

    batch_average = "batch_average"
    pooled = "pooled"
    ema = "ema"


class ReestImages(Enum):
    """Which images BN statistics are re-estimated from."""

    eval = "eval"
    train = "train"


class ActQuant(Enum):
    """What activation quantizers do while BN statistics are re-estimated."""

    auto = "auto"
    frozen = "frozen"
    bypassed = "bypassed"


class Recalibrate(Enum):
    """Whether activation ranges are calibrated anew after re-estimation."""

    auto = "auto"
    always = "always"
    never = "never"


class FoldMode(Enum):
    """Where the BN scale goes."""

    scale = "scale"
    weight = "weight"


class ExportFormat(Enum):
    """What a folded network is written as."""

    checkpoint = "checkpoint"
    onnx = "onnx"
    encodings = "encodings"


class StoreMode(Enum):
    """What becomes of results that an earlier job left in the store."""

    reuse = "reuse"
    refresh = "refresh"
    off = "off"


class Device(Enum):
    """Where the network runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """Arithmetic of the forward and backward pass in training."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class MemoryFormat(Enum):
    """Layout of 4-D tensors."""

    channels_last = "channels_last"
    contiguous = "contiguous"
