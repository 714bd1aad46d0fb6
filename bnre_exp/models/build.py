"""Networks by name: torchvision's, timm's, or any importable callable, with weights and a head that fit the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bnre_exp.algorithms.feeding import device_of, evaluation_mode
from bnre_exp.errors import UserError
from bnre_exp.models.dense import build_detector, build_segmentation, torchvision_detector, torchvision_segmentation
from bnre_exp.models.ultralytics import build_ultralytics, ultralytics_model
from bnre_exp.models.weights import load_checkpoint
from bnre_exp.models.zoo import (
    BuiltModel,
    build_timm,
    build_torchvision,
    head_names,
    replace_heads,
    timm_model,
    torchvision_model,
    weights_setting,
)
from bnre_exp.targets import call_target, resolve_target
from bnre_exp.tasks.classification import Classification
from bnre_exp.tasks.task import Task

_BUILDERS = {torchvision_model: build_torchvision, timm_model: build_timm}
_DENSE = {torchvision_segmentation: build_segmentation, torchvision_detector: build_detector}
_EXAMPLES = {torchvision_detector: "fcos_resnet50_fpn", torchvision_segmentation: "lraspp_mobilenet_v3_large"}


def onnx_model(path: str) -> nn.Module:
    """The network of an ONNX file, as a torch module. Raises UserError as ``build_onnx`` does."""
    return _build_onnx(path).module


def _build_onnx(path: str | None) -> BuiltModel:
    if path is None:
        raise UserError("model.path is not set: expected an ONNX file, as in model=onnx model.path=net.onnx.")
    from bnre_exp.models.from_onnx import build_onnx  # onnx and its runtime take a second to import

    return build_onnx(path)


def _build_own(target: str, factory: Any, kwargs: Mapping[str, Any]) -> BuiltModel:
    module = call_target(factory, target, "model.kwargs", kwargs)
    if not isinstance(module, nn.Module):
        raise UserError(f"model._target_={target} returned a {type(module).__name__}; expected a torch.nn.Module.")
    return BuiltModel(module)


def build_model(
    target: str,
    *,
    name: str | None = None,
    path: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None,
    weights: str | None = None,
    checkpoint: str | None = None,
    strip_prefixes: Sequence[str] = (),
    strict: bool = True,
    replace_head: bool = False,
    trusted: bool = False,
) -> BuiltModel:
    """Build the network that the dotted path ``target`` names, and load its weights.

    :func:`torchvision_model` and :func:`timm_model` get ``name``, ``num_classes`` and ``weights``; a user's own
    callable gets ``kwargs`` only, and :func:`check_output` tells later whether its output fits; :func:`onnx_model` gets
    ``path``, :func:`ultralytics_model` a name or ``path``, a pickle that has to be ``trusted``. ``num_classes`` may be
    None where nothing is made by it. With a ``checkpoint``, ``weights`` is not fetched and gives the preprocessing
    only. ``replace_head``: a last layer of another class count is replaced by a new one. Raises UserError for whatever
    does not exist, cannot be fetched or does not fit.
    """
    factory = resolve_target(target, "model._target_")
    if path is not None and factory not in (onnx_model, ultralytics_model):
        raise UserError(f"model.path={path} means nothing to {target}; it is the file of model=onnx or ultralytics.")
    is_named, kwargs = factory in (*_BUILDERS, *_DENSE), dict(kwargs or {})
    if is_named and not name:
        raise UserError(
            f"model.name is not set: expected an architecture such as {_EXAMPLES.get(factory, 'resnet18')}."
        )
    if not is_named and weights_setting(weights) is not None:
        raise UserError(
            f"model.weights={weights} means nothing to {target}; it is for torchvision's and timm's networks. Give a "
            "file of weights as model.checkpoint; for model=ultralytics and model=onnx, give a file as model.path."
        )
    if factory is ultralytics_model:
        built = build_ultralytics(name, num_classes, path, trusted, kwargs)
    elif factory is onnx_model:
        built = _build_onnx(path)
    elif factory in _DENSE:
        built = _DENSE[factory](str(name), _needed(num_classes), weights if checkpoint is None else None, kwargs)
    elif factory in _BUILDERS:
        how = (weights, checkpoint is None, replace_head, kwargs)
        built = _BUILDERS[factory](str(name), _needed(num_classes), *how)
    else:
        built = _build_own(target, factory, kwargs)
    notes = built.notes
    if checkpoint is not None:
        notes += load_checkpoint(
            built.module,
            checkpoint,
            strip_prefixes=strip_prefixes,
            strict=strict,
            heads=head_names(built.module),
            replace_head=replace_head,
        )
    if replace_head and not is_named:
        notes += replace_heads(built.module, _needed(num_classes))
    return replace(built, pretrained=built.pretrained or checkpoint is not None, notes=notes)


def _needed(num_classes: int | None) -> int:
    if num_classes is None:
        raise UserError(
            "dataset.num_classes is not set, and the network's last layer needs it: the dataset lists neither its "
            "classes' names (classes) nor its images' classes (targets or labels), to count them. Set it."
        )
    return num_classes


def check_output(module: nn.Module, example_input: Tensor, task: Task) -> None:
    """Run one forward pass in evaluation mode, and raise UserError unless it gives what the task takes.

    ``example_input`` is ``[N, C, H, W]``, moved to the module's device. Nothing is changed.
    """
    example = example_input.to(device_of(module))
    with evaluation_mode(module), torch.no_grad():
        try:
            output = module(example)
        except Exception as error:  # the user's code
            kind = "" if isinstance(error, (RuntimeError, ValueError, AssertionError)) else f"{type(error).__name__}: "
            raise UserError(
                f"model: the network cannot take images of shape {list(example.shape)}: {kind}{error}. Check "
                "dataset.image_size (small images are enlarged to it) and the network's input channels."
            ) from error
    task.check_output(output, len(example))


def input_channels(module: nn.Module) -> int | None:
    """Channels of the images that a network takes, 1 or 3, by its first convolution; None where that does not tell."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return part.in_channels if part.in_channels in (1, 3) else None
    return None


def check_head(module: nn.Module, example_input: Tensor, num_classes: int) -> None:
    """:func:`check_output` for classification: the output must be ``[N, num_classes]``."""
    check_output(module, example_input, Classification(num_classes))
