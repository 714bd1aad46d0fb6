"""One dataclass a config group, every field with its unit, checked before work starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bnre_exp.config.choices import (
    ExportFormat,
    FoldMode,
    Optimizer,
    RangeEstimator,
    Schedule,
    WeightGrid,
)
from bnre_exp.config.fields import MOST_BATCHES, check_fields, opt
from bnre_exp.errors import UserError

# Beyond these a number is a slip of the pen, which would be met hours later, or never.
MOST_EPOCHS, MOST_IMAGES, MOST_PIXELS, MOST_RATE = 10**5, 10**6, 2**14, 1e3


@dataclass
class ModelConfig:
    """The network: any importable callable that returns an nn.Module."""

    group: ClassVar[str] = "model"
    _target_: str = opt("bnre_exp.models.torchvision_model", "dotted path of the callable that builds the network")
    name: str | None = opt(None, "architecture name, for the torchvision and timm builders")
    path: str | None = opt(None, "file of the network, for model=onnx and model=ultralytics")
    trusted: bool = opt(False, "true: the file of model=ultralytics may be read, though that runs code that is in it")
    kwargs: dict[str, Any] = opt(factory=dict, doc="keyword arguments of the callable")
    weights: str | None = opt(None, "pretrained weights: a torchvision weights name (DEFAULT), or true for timm")
    checkpoint: str | None = opt(None, "path of a .safetensors or .pth state dict to load")
    strip_prefixes: list[str] = opt(
        factory=lambda: ["module.", "model.", "_orig_mod."],
        doc="removed from the checkpoint's keys where every key has them",
    )
    strict: bool = opt(True, "false: missing and unexpected keys of the checkpoint are listed, not refused")
    replace_head: bool = opt(False, "true: replace a head whose class count is not the dataset's by a new one")
    leaf_modules: list[str] = opt(factory=list, doc="module or class names that tracing does not look into")
    submodules: list[str] = opt(
        factory=list, doc="the parts that are quantized, by name, the rest stays as it is: [backbone, head]; []: all"
    )

    def __post_init__(self) -> None:
        check_fields(self, self.group)
        _check_target(self._target_, "model", "mynet.MyNet")


@dataclass
class DatasetConfig:
    """The data: a callable f(train: bool, root, **kwargs) that returns a dataset of (PIL image or tensor, class)."""

    group: ClassVar[str] = "dataset"
    _target_: str = opt("bnre_exp.data.digits", "dotted path of the callable that builds one split")
    kwargs: dict[str, Any] = opt(factory=dict, doc="more keyword arguments of the callable")
    root: str | None = opt(None, "folder of the data files; null: the dataset's own default")
    num_classes: int | None = opt(None, "number of classes; null: as many as the dataset has", ge=2, le=10**6)
    image_size: int | None = opt(
        None, "height and width fed to the network [pixels]; null: as the weights", ge=8, le=MOST_PIXELS
    )
    mean: list[float] | None = opt(None, "a value per channel, of pixels in [0, 1]; null: as the weights")
    std: list[float] | None = opt(None, "a value per channel, of pixels in [0, 1]; null: as the weights", gt=0)
    channels: str = opt("auto", "of the network's input: 1, 3, or auto, as its first layer has")
    fit: str | None = opt(
        None,
        "how images get their size: crop (shorter side resized, centre cut out), pad (longer side resized, the rest "
        "grey), cut (a window, nothing resized); null: as the task needs it",
    )
    default_image_size: int = opt(32, "image_size where the weights do not say [pixels]", ge=8, le=MOST_PIXELS)
    default_mean: list[float] = opt(factory=lambda: [0.5], doc="mean where the weights do not say")
    default_std: list[float] = opt(factory=lambda: [0.5], doc="std where the weights do not say", gt=0)
    in_memory: bool = opt(True, "keep the resized images in memory (8 bits a value) instead of reading them anew")
    augment: bool = opt(False, "random crop and horizontal flip of training images")
    batch_size: int = opt(128, "images a batch, for training, calibration and re-estimation", ge=2, le=MOST_IMAGES)
    eval_batch_size: int = opt(256, "images a batch, for validation and test", ge=1, le=MOST_IMAGES)
    val_fraction: float = opt(0.1, "part of the training data kept for validation", ge=0, lt=1)
    train_limit: int | None = opt(None, "use at most this many training images; null: all", ge=2)
    test_limit: int | None = opt(None, "use at most this many test images; null: all", ge=1)
    train_epochs: int = opt(15, "FP32 epochs where train.epochs is null", ge=0, le=MOST_EPOCHS)

    def __post_init__(self) -> None:
        check_fields(self, self.group)
        _check_target(self._target_, "dataset", "mydata.load")
        for name, known in (("channels", ("auto", "1", "3")), ("fit", (None, "crop", "pad", "cut"))):
            if getattr(self, name) not in known:
                shown = ", ".join(map(str, filter(None, known)))
                raise UserError(f"dataset.{name}={getattr(self, name)}: expected one of {shown}.")
        for name in ("mean", "std", "default_mean", "default_std"):
            if getattr(self, name) == []:
                raise UserError(f"dataset.{name} is empty: expected a number for each channel.")


@dataclass
class TaskConfig:
    """What the network is for: a class as ``bnre_exp/tasks/task.py`` describes it."""

    group: ClassVar[str] = "task"
    _target_: str = opt("bnre_exp.tasks.Classification", "dotted path of the class")
    kwargs: dict[str, Any] = opt(factory=dict, doc="keyword arguments of the class")

    def __post_init__(self) -> None:
        check_fields(self, self.group)
        _check_target(self._target_, "task", "mytask.Depth")


@dataclass
class TrainConfig:
    """FP32 training."""

    group: ClassVar[str] = "train"
    epochs: int | None = opt(
        None,
        "passes over the training data; null: dataset.train_epochs, or 0 where weights are loaded",
        ge=0,
        le=MOST_EPOCHS,
    )
    lr: float = opt(0.05, "peak learning rate", gt=0, le=MOST_RATE)
    optimizer: Optimizer = opt(Optimizer.sgd, "sgd or adamw")
    momentum: float = opt(0.9, "of SGD", ge=0, lt=1)
    weight_decay: float = opt(
        5e-4, "L2 penalty on weights; never on BN parameters, biases or scales", ge=0, le=MOST_RATE
    )
    schedule: Schedule = opt(Schedule.one_cycle, "one_cycle, cosine or constant")
    label_smoothing: float = opt(0.0, "fraction of the target spread over all classes", ge=0, lt=1)

    def __post_init__(self) -> None:
        check_fields(self, self.group)


@dataclass
class Fp32Config:
    """What the FP32 network must reach before anything else starts."""

    group: ClassVar[str] = "fp32"
    min_headline: float | None = opt(None, "stop the run if FP32's headline metric is worse than this; null: never")
    min_top1: float | None = opt(None, "old name of min_headline", is_old=True, ge=0, le=1)

    def __post_init__(self) -> None:
        check_fields(self, self.group)
        if self.min_top1 is not None and self.min_headline not in (None, self.min_top1):
            raise UserError(
                "fp32.min_top1 is the old name of fp32.min_headline, and they differ; give the new one alone."
            )
        self.min_headline = self.min_top1 if self.min_headline is None else self.min_headline


@dataclass
class LayerOverride:
    """What differs for the layers and operations that a pattern matches."""

    group: ClassVar[str] = "quant.overrides[]"
    pattern: str = opt("", "names, with * and ?, as the run's report lists them: layer3.*, classifier.1")
    weight_bits: int | None = opt(None, "bits of weights; null: as the scheme", ge=2, le=16)
    act_bits: int | None = opt(None, "bits of the output; null: as the scheme", ge=2, le=16)
    off: bool = opt(False, "true: neither weights nor output are quantized")

    def __post_init__(self) -> None:
        check_fields(self, self.group)
        if not self.pattern:
            raise UserError("quant.overrides: an entry has no pattern; write {pattern: 'layer3.*', weight_bits: 8}.")
        if not self.off and self.weight_bits is None and self.act_bits is None:
            raise UserError(
                f"quant.overrides: {self.pattern!r} changes nothing; give weight_bits, act_bits or off: true."
            )


@dataclass
class QuantConfig:
    """The quantization scheme and its calibration."""

    group: ClassVar[str] = "quant"
    weight_bits: int | None = opt(8, "bits of weights, 2 to 16; null: float weights", ge=2, le=16)
    act_bits: int | None = opt(8, "bits of activations, 2 to 16; null: float activations", ge=2, le=16)
    per_channel: bool = opt(True, "one weight scale per output channel; false: one per tensor")
    range_learning: bool = opt(True, "QAT trains the scales (LSQ); false: they stay as calibrated")
    first_last_bits: int | None = opt(
        None, "bits of the first and last layer (weights, inputs, and the output); null: as the others", ge=2, le=16
    )
    overrides: list[LayerOverride] = opt(factory=list, doc="exceptions by layer: [{pattern: 'layer3.*', act_bits: 8}]")
    weight_grid: WeightGrid = opt(
        WeightGrid.narrow, "codes of weights: narrow, from -(2^(bits-1)-1) to 2^(bits-1)-1; full, all 2^bits"
    )
    weight_range: RangeEstimator = opt(RangeEstimator.mse, "range estimator of weights: mse, minmax or percentile")
    act_range: RangeEstimator = opt(RangeEstimator.mse, "range estimator of activations: mse, minmax or percentile")
    percentile: float = opt(99.99, "of values, kept by the percentile estimator [percent]", gt=50, le=100)
    calib_batches: int = opt(8, "batches of training data that activation ranges are fitted on", ge=1, le=MOST_BATCHES)

    def __post_init__(self) -> None:
        check_fields(self, self.group)
        if self.weight_bits is None and self.act_bits is None:
            raise UserError("quant.weight_bits and quant.act_bits are both null: nothing would be quantized.")


@dataclass
class FoldConfig:
    """Folding BN into the layer before it."""

    group: ClassVar[str] = "fold"
    mode: FoldMode = opt(
        FoldMode.scale, "scale: into the weight scale, exact (per-channel weights); weight: quantize the weights anew"
    )
    bias_bits: int | None = opt(32, "bits of biases on the grid s_in*s_w; null: float biases", ge=8, le=32)

    def __post_init__(self) -> None:
        check_fields(self, self.group)


@dataclass
class ExportConfig:
    """The files that a run leaves of the folded network."""

    group: ClassVar[str] = "export"
    formats: list[ExportFormat] = opt(
        factory=lambda: [ExportFormat.checkpoint, ExportFormat.onnx],
        doc="any of checkpoint (for torch), onnx (with Q/DQ), encodings (plain ONNX and AIMET encodings); []: no files",
    )
    opset: int = opt(21, "of ONNX models; 9 to 16 bits and 4-bit types need 21", ge=13, le=23)
    int4: bool = opt(True, "weights of up to 4 bits in ONNX's 4-bit type, where the opset has it")
    min_agreement: float = opt(
        0.98, "least part of the test images for which a file predicts what the simulation does", ge=0, le=1
    )

    def __post_init__(self) -> None:
        check_fields(self, self.group)
        if len(set(self.formats)) < len(self.formats):
            raise UserError("export.formats names a format twice.")


def _check_target(target: str, group: str, example: str) -> None:
    """A dotted path by its form; whether it can be imported is told where it is."""
    if not target:
        raise UserError(f"{group}._target_ is empty: expected the dotted path of a callable, such as {example}.")
    if not all(part.isidentifier() for part in target.replace(":", ".", 1).split(".")):
        raise UserError(f"{group}._target_={target!r} is no dotted path; expected something like {example}.")
