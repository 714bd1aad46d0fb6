"""Networks of other packages than torchvision and timm, for zoo.py: names by package, and how each is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

Sizes = list[tuple[int, ...]]
Built = tuple[nn.Module, Sizes]

YOLO = {
    "DetectionModel": (
        "yolov3-tiny", "yolov5n", "yolov5n-p6", "yolov6n", "yolov8n", "yolov8n-p2", "yolov8n-p6", "yolov8-ghost",
        "yolov9t", "yolov9c", "yolov10n", "yolo11n", "yolo12n", "yolo26n",
    ),
    "SegmentationModel": ("yolov8n-seg", "yolo11n-seg", "yolo12n-seg"),
    "PoseModel": ("yolov8n-pose", "yolo11n-pose"),
    "ClassificationModel": ("yolov8n-cls", "yolo11n-cls", "yolo12n-cls"),
    "OBBModel": ("yolov8n-obb", "yolo11n-obb", "yolo12n-obb"),
}  # fmt: skip
DECODERS = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet")
ENCODERS = ("resnet18", "mobilenet_v2", "efficientnet-b0")
_SMALL = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64], "embedding_size": 16}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNetForImageClassification": ("ResNetConfig", _SMALL),
    "RegNetForImageClassification": ("RegNetConfig", {**_SMALL, "groups_width": 8}),
    "MobileNetV1ForImageClassification": ("MobileNetV1Config", {}),
    "MobileNetV2ForImageClassification": ("MobileNetV2Config", {}),
    "MobileNetV2ForSemanticSegmentation": ("MobileNetV2Config", {}),
    "MobileViTForImageClassification": ("MobileViTConfig", {}),
    "MobileViTForSemanticSegmentation": ("MobileViTConfig", {}),
    "MobileViTV2ForImageClassification": ("MobileViTV2Config", {}),
    "MobileViTV2ForSemanticSegmentation": ("MobileViTV2Config", {}),
    "EfficientNetForImageClassification": (
        "EfficientNetConfig", {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    ),
    "LevitForImageClassification": ("LevitConfig", {}),
    "LevitForImageClassificationWithTeacher": ("LevitConfig", {}),
    "SwiftFormerForImageClassification": ("SwiftFormerConfig", {}),
    "CvtForImageClassification": ("CvtConfig", {}),
    "SegformerForSemanticSegmentation": ("SegformerConfig", {}),
    "GLPNForDepthEstimation": ("GLPNConfig", {}),
    "UperNetForSemanticSegmentation": ("UperNetConfig", {}),
    "HGNetV2ForImageClassification": ("HGNetV2Config", {}),
    "RTDetrForObjectDetection": ("RTDetrConfig", {}),
    "DFineForObjectDetection": ("DFineConfig", {}),
}  # fmt: skip
MONAI: dict[str, tuple[str, dict[str, Any]]] = {
    "BasicUNet": ("BasicUNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "norm": "batch"}),
    "UNet": (
        "UNet",
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "channels": (8, 16, 32), "strides": (2, 2),
         "norm": "batch", "num_res_units": 2},
    ),
    "SegResNet": (
        "SegResNet", {"spatial_dims": 2, "init_filters": 8, "in_channels": 1, "out_channels": 3, "norm": "batch"}
    ),
    "DynUNet": (
        "DynUNet",
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "kernel_size": [3, 3, 3], "strides": [1, 2, 2],
         "upsample_kernel_size": [2, 2], "norm_name": "batch", "deep_supervision": True, "deep_supr_num": 1},
    ),
    "VNet": ("VNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}),
    "AttentionUnet": (
        "AttentionUnet",
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "channels": (8, 16, 32), "strides": (2, 2)},
    ),
    "HighResNet": ("HighResNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "norm_type": "batch"}),
    "DenseNet121": ("DenseNet121", {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}),
    "SEResNet50": ("SEResNet50", {"spatial_dims": 2, "in_channels": 1, "num_classes": 3}),
    "EfficientNetBN": (
        "EfficientNetBN",
        {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 2, "in_channels": 1, "num_classes": 3},
    ),
    "resnet18": ("resnet18", {"spatial_dims": 2, "n_input_channels": 1, "num_classes": 3}),
    "VarAutoEncoder": (
        "VarAutoEncoder",
        {"spatial_dims": 2, "in_shape": (1, 64, 64), "out_channels": 1, "latent_size": 8, "channels": (8, 16),
         "strides": (2, 2), "norm": "batch"},
    ),
    "FlexibleUNet": (
        "FlexibleUNet",
        {"in_channels": 1, "out_channels": 3, "backbone": "efficientnet-b0", "spatial_dims": 2},
    ),
    "AHNet": ("AHNet", {"spatial_dims": 2}),
    "RegUNet": (
        "RegUNet",
        {"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 8, "depth": 2, "out_channels": 2},
    ),
}  # fmt: skip


def _ultralytics(name: str) -> Built:
    from ultralytics.nn import tasks

    kind = next(kind for kind, names in YOLO.items() if name in names)
    return getattr(tasks, kind)(f"{name}.yaml", nc=10, verbose=False), [(3, 64, 64)]


def _segmentation(name: str) -> Built:
    import segmentation_models_pytorch as smp

    decoder, _, encoder = name.partition("-")
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=3), [(3, 64, 64), (3, 128, 128)]


def _hugging_face(name: str) -> Built:
    import transformers

    config, kwargs = HUGGING_FACE[name]
    if name.startswith("UperNet"):
        backbone = transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"], **_SMALL)
        kwargs = {"backbone_config": backbone, "auxiliary_in_channels": 32}
    sizes: Sizes = [(3, 64, 64), (3, 224, 224)]
    needs_size = name.startswith(("Levit", "SwiftFormer", "RTDetr", "DFine"))
    return getattr(transformers, name)(getattr(transformers, config)(**kwargs)), sizes[1:] if needs_size else sizes


def _monai(name: str) -> Built:
    from monai.networks import nets

    kind, kwargs = MONAI[name]
    return getattr(nets, kind)(**kwargs), [(1, 64, 64), (1, 128, 128)]


def _efficientnet_pytorch(name: str) -> Built:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name(name), [(3, 64, 64)]


def _pytorchcv(name: str) -> Built:
    from pytorchcv.model_provider import get_model

    model = get_model(name)
    size = getattr(model, "in_size", (224, 224))
    return model, [(3, 64, 64), (3, 128, 128), (3, *size)]


def _families_of_pytorchcv() -> Sequence[str]:
    from pytorchcv import model_provider

    first: dict[str, str] = {}
    for name, builder in sorted(model_provider._models.items()):
        first.setdefault(builder.__module__, name)
    return list(first.values())


SOURCES: dict[str, tuple[Callable[[], Sequence[str]], Callable[[str], Built]]] = {
    "ultralytics": (lambda: [name for names in YOLO.values() for name in names], _ultralytics),
    "segmentation_models_pytorch": (lambda: [f"{d}-{e}" for d in DECODERS for e in ENCODERS], _segmentation),
    "transformers": (lambda: list(HUGGING_FACE), _hugging_face),
    "monai": (lambda: list(MONAI), _monai),
    "efficientnet_pytorch": (lambda: [f"efficientnet-b{i}" for i in range(4)], _efficientnet_pytorch),
    "pytorchcv": (_families_of_pytorchcv, _pytorchcv),
}
