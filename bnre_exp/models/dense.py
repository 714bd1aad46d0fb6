"""torchvision's networks for segmentation and detection: by name, with weights or without."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bnre_exp.data.preprocess import Preprocessing
from bnre_exp.errors import UserError, few
from bnre_exp.models.zoo import BuiltModel, guarded, torchvision_weights, unknown_name, weights_setting

# The parts of a detector that compute with weights; what chooses boxes between them stays as it is.
ONE_STAGE = ("backbone", "head")
TWO_STAGES = (
    "backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor", "roi_heads.mask_head",
    "roi_heads.mask_predictor", "roi_heads.keypoint_head", "roi_heads.keypoint_predictor",
)  # fmt: skip
WITH_BACKGROUND = ("fasterrcnn", "maskrcnn", "keypointrcnn", "ssd")  # class 0 is no object in them


def torchvision_segmentation(name: str, num_classes: int, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """torchvision's segmentation network ``name``, such as deeplabv3_mobilenet_v3_large; as ``torchvision_model``."""
    return build_segmentation(name, num_classes, weights, kwargs).module


def torchvision_detector(name: str, num_classes: int, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """torchvision's detector ``name``, such as fcos_resnet50_fpn; ``num_classes`` without background."""
    return build_detector(name, num_classes, weights, kwargs).module


def build_segmentation(name: str, num_classes: int, weights: str | None, kwargs: Mapping[str, Any]) -> BuiltModel:
    """As :func:`torchvision_segmentation`, with what is known. Raises ``UserError`` for unknown names, weights of
    another number of classes, and failed downloads."""
    entry = _entry(name, torchvision.models.segmentation, weights, "segmentation network")
    classes = None if entry is None else len(entry.meta["categories"])
    _check_count(name, classes, num_classes)
    module = _made(name, entry, num_classes, kwargs)
    preprocessing = None
    if entry is not None:
        known = entry.transforms()
        size = int(known.resize_size[0])
        preprocessing = Preprocessing(size, size, tuple(known.mean), tuple(known.std), fit="pad")
    return BuiltModel(module, preprocessing, entry is not None)


def build_detector(name: str, num_classes: int, weights: str | None, kwargs: Mapping[str, Any]) -> BuiltModel:
    """As :func:`torchvision_detector`, with what is known. FrozenBatchNorm2d, which pretrained detectors have, become
    batch norms with the same statistics that stay frozen in training, so that they can be re-estimated and folded.
    ``class_labels``, an attribute of the network, is what it calls each class. Raises ``UserError`` as
    :func:`build_segmentation` does."""
    entry = _entry(name, torchvision.models.detection, weights, "detector")
    first = int(name.startswith(WITH_BACKGROUND))
    labels, classes = list(range(first, first + num_classes)), first + num_classes
    if entry is not None:  # of COCO: by its own numbers, some of which are no class
        categories = entry.meta["categories"]
        none = ("__background__", "no person", "N/A")
        labels = [place for place, known in enumerate(categories) if known not in none]
        _check_count(name, len(labels), num_classes)
        classes = len(categories)
    module = _made(name, entry, classes, kwargs)
    module.class_labels = tuple(labels)  # type: ignore[assignment]
    thawed = _thaw(module)
    notes = (f"{thawed} FrozenBatchNorm2d are batch norms now, frozen in training",) if thawed else ()
    parts = tuple(part for part in (*ONE_STAGE, *TWO_STAGES[1:]) if _has(module, part))
    return BuiltModel(
        module, None, entry is not None, notes, takes_unit_range=True, submodules=parts,
        at_size=partial(_at_size, module),
    )  # fmt: skip


def _entry(name: str, room: Any, weights: str | None, kind: str) -> Any:
    known = torchvision.models.list_models(module=room)
    if name not in known:
        raise UserError(unknown_name(name, known, "torchvision", kind))
    wanted = weights_setting(weights)
    return torchvision_weights(name, wanted) if wanted else None


def _check_count(name: str, classes: int | None, num_classes: int) -> None:
    """Raise ``UserError`` where the weights are those of other classes."""
    if classes not in (None, num_classes):
        raise UserError(
            f"model.name={name}: its weights tell {classes} classes apart, the dataset has {num_classes}. Leave "
            "model.weights out, or give +model.kwargs.weights_backbone=DEFAULT to start from a trained backbone."
        )


def _made(name: str, entry: Any, classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    options = {"weights_backbone": None, **kwargs, "num_classes": classes}

    def build() -> nn.Module:
        module: nn.Module = torchvision.models.get_model(name, weights=entry, **options)
        return module

    _check_arguments(name, kwargs)
    return guarded(build, name, options, None if entry is None else str(entry), getattr(entry, "url", ""))


def _check_arguments(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for arguments that torchvision would pass over: its builders hand them on, to detectors that
    take any."""
    builder: Any = torchvision.models.get_model_builder(name)
    detection = torchvision.models.detection
    kinds = (detection.FasterRCNN, detection.FCOS, detection.KeypointRCNN, detection.MaskRCNN, detection.RetinaNet,
             detection.ssd.SSD)  # fmt: skip
    takers = [builder, *(kinds if builder.__module__.startswith(detection.__name__) else ())]
    known = {parameter for taker in takers for parameter in inspect.signature(taker).parameters}
    if unknown := [argument for argument in kwargs if argument not in known]:
        like = difflib.get_close_matches(unknown[0], known, n=1)
        raise UserError(
            f"model.kwargs: {name} takes no {few(unknown)}." + (f" Did you mean {like[0]}?" if like else "")
        )


def _has(module: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in module.named_modules())


def _thaw(module: nn.Module) -> int:
    """Replace, in place, every FrozenBatchNorm2d by a batch norm in evaluation mode; returns their number."""
    found = [(name, part) for name, part in module.named_modules() if isinstance(part, FrozenBatchNorm2d)]
    for name, frozen in found:
        bn = nn.BatchNorm2d(len(frozen.weight), eps=frozen.eps)
        bn.load_state_dict(frozen.state_dict(), strict=False)
        module.set_submodule(name, bn.eval())
    return len(found)


def _at_size(module: nn.Module, size: int) -> None:
    """Let a detector take images as the data loader gives them, instead of enlarging them to 800 pixels."""
    transform: Any = module.transform
    if getattr(transform, "fixed_size", None) is None:
        transform.min_size, transform.max_size = (size,), size
