"""Networks of other packages than torchvision and timm, for zoo.py: names by package, and how each is built."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pieces import Arguments, Built
from torch import nn

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


def _sequences(count: int) -> tuple[torch.Tensor, ...]:
    lengths = torch.randint(24, 49, (count,))
    lengths[0] = 48
    return torch.randn(count, 48, 40), lengths


def _spectra_and_lengths(count: int) -> tuple[torch.Tensor, ...]:
    _, lengths = _sequences(count)
    return torch.randn(count, 64, 48), lengths


def _text_and_spectrogram(count: int) -> tuple[torch.Tensor, ...]:
    full = torch.ones(count, dtype=torch.int64)
    return torch.randint(20, (count, 12)), 12 * full, torch.randn(count, 16, 10), 10 * full


def _wave_and_spectrogram(count: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(count, 1, 6 * 64), torch.randn(count, 1, 32, 10)


TORCHAUDIO: dict[str, tuple[dict[str, Any], Arguments, tuple[str, ...]]] = {
    "Conformer": (
        {"input_dim": 40, "num_heads": 4, "ffn_dim": 64, "num_layers": 2, "depthwise_conv_kernel_size": 15},
        _sequences, tuple(f"conformer_layers.{i}.{part}" for i in (0, 1) for part in ("ffn1", "conv_module", "ffn2")),
    ),
    "Tacotron2": (
        {"n_mels": 16, "n_symbol": 20, "symbol_embedding_dim": 32, "encoder_embedding_dim": 32, "decoder_rnn_dim": 32,
         "attention_rnn_dim": 32, "prenet_dim": 16, "postnet_embedding_dim": 32},
        _text_and_spectrogram, (*(f"encoder.convolutions.{i}" for i in range(3)), "postnet"),
    ),
    "WaveRNN": (
        {"upsample_scales": [4, 4, 4], "n_classes": 32, "hop_length": 64, "n_res_block": 3, "n_rnn": 32, "n_fc": 32,
         "n_freq": 32, "n_hidden": 32, "n_output": 32},
        _wave_and_spectrogram, (),
    ),
}  # fmt: skip
PYTORCHCV_OF_SOUND: dict[str, tuple[dict[str, Any], Arguments]] = {
    "jasper": ({"from_audio": False}, _spectra_and_lengths),
    "quartznet": ({"from_audio": False}, _spectra_and_lengths),
    "voca": ({}, lambda count: (torch.randn(count, 1, 16, 29), torch.full((count,), 3))),
}
_CHANNELS = {"channels": [64, 64, 64, 64, 192], "attention_channels": 32, "se_channels": 32, "lin_neurons": 48}
SPEECHBRAIN: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "ECAPA_TDNN": ("ECAPA_TDNN", {"input_size": 40, **_CHANNELS}, (64, 40)),
    "Xvector": ("Xvector", {"in_channels": 40}, (64, 40)),
    "ResNet": ("ResNet", {"input_size": 40, "lin_neurons": 48, "channels": [16, 16, 32, 32]}, (64, 40)),
    "ContextNet": (
        "ContextNet",
        {"input_shape": (5, 64, 40), "out_channels": 32, "conv_channels": [32] * 4, "strides": [1, 2, 1, 2],
         "num_blocks": 4},
        (64, 40),
    ),
    "Cnn14": ("Cnn14", {"mel_bins": 64, "emb_dim": 64}, (96, 64)),
    "CRDNN": (
        "CRDNN",
        {"input_shape": (5, 12, 40), "cnn_blocks": 1, "rnn_layers": 1, "rnn_neurons": 16, "rnn_bidirectional": False,
         "dnn_neurons": 32},
        (12, 40),
    ),
    "EnhanceResnet": (
        "EnhanceResnet", {"n_fft": 256, "win_length": 16, "channel_counts": [16, 16], "dense_nodes": 32}, (4000,),
    ),
}  # fmt: skip
DETECTORS = (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2", "ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn",
)  # fmt: skip


FEW_BOXES = {  # every one costs as much as an image
    "rpn_post_nms_top_n_train": 40, "rpn_post_nms_top_n_test": 40, "box_batch_size_per_image": 16,
    "box_detections_per_img": 8,
}  # fmt: skip


def _ultralytics(name: str) -> Built:
    from ultralytics.nn import tasks

    kind = next(kind for kind, names in YOLO.items() if name in names)
    return Built(getattr(tasks, kind)(f"{name}.yaml", nc=10, verbose=False), [(3, 64, 64)])


def _segmentation(name: str) -> Built:
    import segmentation_models_pytorch as smp

    decoder, _, encoder = name.partition("-")
    return Built(getattr(smp, decoder)(encoder, encoder_weights=None, classes=3), [(3, 64, 64), (3, 128, 128)])


def _hugging_face(name: str) -> Built:
    import transformers

    config, kwargs = HUGGING_FACE[name]
    if name.startswith("UperNet"):
        backbone = transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"], **_SMALL)
        kwargs = {"backbone_config": backbone, "auxiliary_in_channels": 32}
    sizes = [(3, 64, 64), (3, 224, 224)]
    needs_size = name.startswith(("Levit", "SwiftFormer", "RTDetr", "DFine"))
    model = getattr(transformers, name)(getattr(transformers, config)(**kwargs))
    return Built(model, sizes[1:] if needs_size else sizes)


def _monai(name: str) -> Built:
    from monai.networks import nets

    kind, kwargs = MONAI[name]
    return Built(getattr(nets, kind)(**kwargs), [(1, 64, 64), (1, 128, 128)])


def _efficientnet_pytorch(name: str) -> Built:
    from efficientnet_pytorch import EfficientNet

    return Built(EfficientNet.from_name(name), [(3, 64, 64)])


def _pytorchcv(name: str) -> Built:
    from pytorchcv.model_provider import get_model

    for prefix, (kwargs, arguments) in PYTORCHCV_OF_SOUND.items():
        if name.startswith(prefix):
            return Built(get_model(name, **kwargs), [arguments])
    model = get_model(name)
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), 3)
    channels = channels if channels in (1, 3) else 3  # some put squares of pixels into channels first
    size = getattr(model, "in_size", (224, 224))
    if min(size) > 400:  # street scenes, which some of them take at the size that they were built for only
        size = (256, 256)
        model = get_model(name, in_size=size)
    smaller = [edge for edge in (64, 128, 256) if edge < min(size)]
    return Built(model, [*((channels, edge, edge) for edge in smaller), (channels, *size)])


def _families_of_pytorchcv() -> Sequence[str]:
    """Of every file of networks the first name, numbers in order of size: the smallest, most often. Files of networks
    for the images of CUB build what other files build; VisemeNet makes its windows over the samples of a batch."""
    from pytorchcv import model_provider

    first: dict[str, str] = {}
    for name, builder in sorted(model_provider._models.items(), key=lambda item: _by_numbers(item[0])):
        first.setdefault(builder.__module__, name)
    return [name for module, name in first.items() if not module.endswith(("_cub", ".visemenet"))]


def _by_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(digits or 0), letters) for letters, digits in re.findall(r"(\D*)(\d*)", name)]


def _torchaudio(name: str) -> Built:
    from torchaudio import models

    kwargs, arguments, parts = TORCHAUDIO[name]
    return Built(getattr(models, name)(**kwargs), [arguments], parts)


def _speechbrain(name: str) -> Built:
    module, kwargs, shape = SPEECHBRAIN[name]
    kind = getattr(importlib.import_module(f"speechbrain.lobes.models.{module}"), name)
    return Built(kind(**kwargs), [shape])


def _facenet_pytorch(name: str) -> Built:
    import facenet_pytorch

    return Built(getattr(facenet_pytorch, name)(), [(3, 96, 96), (3, 160, 160)])


def _torchvision_detection(name: str) -> Built:
    from bnre_exp.models.dense import build_detector

    built = build_detector(name, 3, None, FEW_BOXES if "rcnn" in name else {})
    if built.at_size is not None:
        built.at_size(128)
    return Built(built.module, [_scenes], built.submodules)


def _scenes(count: int) -> tuple[Any, ...]:
    """Images of two sizes with two objects each, as torchvision's detectors take them."""
    sizes = [(96, 128) if place % 2 else (128, 112) for place in range(count)]
    targets = []
    for height, width in sizes:
        corners = torch.rand(2, 2) * torch.tensor([width, height]) / 2
        boxes = torch.cat([corners, corners + 16 + torch.rand(2, 2) * 24], dim=1)
        middle = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, torch.ones(2, 1)], dim=1)
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top:bottom, left:right] = 1
        labels = torch.tensor([1, 2])
        targets.append(
            {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": middle[:, None].repeat(1, 17, 1)}
        )
    return [torch.rand(3, *size) for size in sizes], targets


SOURCES: dict[str, tuple[Callable[[], Sequence[str]], Callable[[str], Built]]] = {
    "ultralytics": (lambda: [name for names in YOLO.values() for name in names], _ultralytics),
    "segmentation_models_pytorch": (lambda: [f"{d}-{e}" for d in DECODERS for e in ENCODERS], _segmentation),
    "transformers": (lambda: list(HUGGING_FACE), _hugging_face),
    "monai": (lambda: list(MONAI), _monai),
    "efficientnet_pytorch": (lambda: [f"efficientnet-b{i}" for i in range(4)], _efficientnet_pytorch),
    "pytorchcv": (_families_of_pytorchcv, _pytorchcv),
    "torchaudio": (lambda: list(TORCHAUDIO), _torchaudio),
    "speechbrain": (lambda: list(SPEECHBRAIN), _speechbrain),
    "facenet_pytorch": (lambda: ["InceptionResnetV1"], _facenet_pytorch),
    "torchvision_detection": (lambda: list(DETECTORS), _torchvision_detection),
}
