"""Networks and their weights. Configurations name the builders here: ``bnre_exp.models.torchvision_model``."""

from bnre_exp.models.build import build_model, check_head, onnx_model
from bnre_exp.models.dense import torchvision_detector, torchvision_segmentation
from bnre_exp.models.ultralytics import ultralytics_model
from bnre_exp.models.zoo import (
    BuiltModel,
    timm_model,
    timm_preprocessing,
    torchvision_model,
    torchvision_preprocessing,
)

__all__ = [
    "BuiltModel",
    "build_model",
    "check_head",
    "onnx_model",
    "timm_model",
    "timm_preprocessing",
    "torchvision_detector",
    "torchvision_model",
    "torchvision_preprocessing",
    "torchvision_segmentation",
    "ultralytics_model",
]
