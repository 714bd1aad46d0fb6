"""torchvision's detectors and segmentation networks: what is built, with what names, and which weights are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FrozenBatchNorm2d

from bnre_exp.errors import UserError
from bnre_exp.models.build import build_model
from bnre_exp.models.dense import build_detector, build_segmentation, torchvision_detector, torchvision_segmentation
from bnre_exp.models.zoo import BuiltModel

QUICK = {"fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"}
QUICK |= {"deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"}
DETECTORS = torchvision.models.list_models(module=torchvision.models.detection)
SEGMENTERS = torchvision.models.list_models(module=torchvision.models.segmentation)
WITHOUT_BACKGROUND = ("fcos", "retinanet")


def each(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


def randomized(module: nn.Module) -> nn.Module:
    """Batch norms' values differ from those of new ones."""
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            for value in (part.weight, part.bias, part.running_mean):
                value.data.add_(torch.rand_like(value) / 10)
            part.running_var.data.mul_(torch.rand_like(part.running_var) + 0.5)
    return module


@pytest.mark.parametrize("name", each(DETECTORS))
def test_every_detector_is_built_and_finds_its_own_classes(name: str) -> None:
    built = build_model("bnre_exp.models.torchvision_detector", name=name, num_classes=3)
    module = built.module.eval()
    first = 0 if name.startswith(WITHOUT_BACKGROUND) else 1
    assert module.class_labels == (first, first + 1, first + 2)
    assert not built.pretrained and built.takes_unit_range and built.preprocessing is None and not built.notes
    assert built.at_size is not None
    built.at_size(64)
    with torch.no_grad():
        found = module([torch.rand(3, 64, 64)])[0]
    assert {"boxes", "labels", "scores"} <= set(found)
    assert set(found["labels"].tolist()) <= set(module.class_labels)


@pytest.mark.parametrize("name", each(DETECTORS))
def test_the_parts_of_a_detector_exist_and_hold_all_of_its_layers(name: str) -> None:
    built = build_detector(name, 3, None, {})
    layers = {n for n, part in built.module.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))}
    inside = {n for n in layers if n.startswith(tuple(f"{part}." for part in built.submodules))}
    for part in built.submodules:
        assert isinstance(built.module.get_submodule(part), nn.Module)
    assert built.submodules[0] == "backbone" and inside == layers


@pytest.mark.parametrize("name", each(SEGMENTERS))
def test_every_segmentation_network_is_built_and_has_the_datasets_classes(name: str) -> None:
    built = build_model("bnre_exp.models.torchvision_segmentation", name=name, num_classes=5)
    with torch.no_grad():
        assert built.module.eval()(torch.rand(1, 3, 64, 64))["out"].shape == (1, 5, 64, 64)
    assert not built.pretrained and not built.takes_unit_range and built.preprocessing is None
    assert built.submodules == () and built.at_size is None


def test_the_functions_that_configurations_name_return_the_networks() -> None:
    assert isinstance(torchvision_detector("ssdlite320_mobilenet_v3_large", 2), SSD)
    network = torchvision_segmentation("deeplabv3_mobilenet_v3_large", 2, aux_loss=True)
    assert set(network.train()(torch.rand(2, 3, 64, 64))) == {"out", "aux"}


def test_frozen_batch_norms_become_batch_norms_and_change_no_output() -> None:
    layer = partial(FrozenBatchNorm2d, eps=1e-3)
    torch.manual_seed(0)
    built = build_detector("ssdlite320_mobilenet_v3_large", 3, None, {"norm_layer": layer})
    torch.manual_seed(0)
    theirs = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights_backbone=None, num_classes=4, norm_layer=layer
    )
    frozen = [name for name, part in theirs.named_modules() if isinstance(part, FrozenBatchNorm2d)]
    assert frozen and built.notes == (f"{len(frozen)} FrozenBatchNorm2d are batch norms now, frozen in training",)
    randomized(theirs)
    built.module.load_state_dict(theirs.state_dict(), strict=False)
    for name in frozen:
        thawed = built.module.get_submodule(name)
        assert type(thawed) is nn.BatchNorm2d and thawed.eps == 1e-3 and not thawed.training
        assert built.module.get_submodule(name.rpartition(".")[0]).training
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours, expected = (list(network.backbone(images).values()) for network in (built.module, theirs))
    assert max(float(features.abs().max()) for features in expected) > 0.01
    for features, same in zip(ours, expected):
        torch.testing.assert_close(features, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "sides"), [("fcos_resnet50_fpn", 64), ("ssdlite320_mobilenet_v3_large", 320)])
def test_a_detector_takes_images_at_the_size_that_the_data_have_unless_its_own_is_fixed(name: str, sides: int) -> None:
    built = build_detector(name, 3, None, {})
    assert built.at_size is not None
    built.at_size(64)
    images, _ = built.module.transform([torch.rand(3, 64, 64)])
    assert images.tensors.shape[-2:] == (sides, sides)


@pytest.fixture
def weights_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """Lets torchvision find random weights of a network where it keeps what it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)

    def save(name: str, classes: int, **kwargs: object) -> nn.Module:
        network = randomized(torchvision.models.get_model(name, weights_backbone=None, num_classes=classes, **kwargs))
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        torch.save(network.state_dict(), tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
        return network

    return save


def test_weights_of_coco_come_with_its_own_numbers_of_the_classes(weights_at_hand: Callable[..., nn.Module]) -> None:
    name = "fcos_resnet50_fpn"
    network = weights_at_hand(name, 91).eval()
    built = build_detector(name, 80, "DEFAULT", {})
    known = torchvision.models.get_model_weights(name).DEFAULT.meta["categories"]
    assert built.pretrained and len(built.module.class_labels) == 80
    named = [known[label] for label in built.module.class_labels]
    assert named[:2] == ["person", "bicycle"] and named[-1] == "toothbrush" and "N/A" not in named
    assert "53 FrozenBatchNorm2d" in built.notes[0]
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for features, same in zip(built.module.backbone(x).values(), network.backbone(x).values()):
            torch.testing.assert_close(features, same, rtol=1e-3, atol=1e-4)


def test_segmentation_weights_bring_their_preprocessing(weights_at_hand: Callable[..., nn.Module]) -> None:
    name = "deeplabv3_mobilenet_v3_large"
    network = weights_at_hand(name, 21, aux_loss=True)
    built = build_segmentation(name, 21, "DEFAULT", {})
    assert built.pretrained and built.preprocessing is not None
    assert (built.preprocessing.image_size, built.preprocessing.fit) == (520, "pad")
    assert built.preprocessing.mean == (0.485, 0.456, 0.406) and built.preprocessing.std == (0.229, 0.224, 0.225)
    state = built.module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


REFUSED = [
    (build_detector, "fcos_resnet50", 3, None, {}, r"not a detector of torchvision. Close names: fcos_resnet50_fpn"),
    (build_detector, "resnet18", 3, None, {}, "model.name=resnet18 is not a detector"),
    (build_segmentation, "deeplab_resnet50", 3, None, {}, "not a segmentation network.*deeplabv3_resnet50"),
    (build_segmentation, "fcos_resnet50_fpn", 3, None, {}, "not a segmentation network of torchvision"),
    (build_detector, "fcos_resnet50_fpn", 10, "DEFAULT", {}, "weights tell 80 classes apart, the dataset has 10"),
    (build_detector, "ssdlite320_mobilenet_v3_large", 91, "COCO_V1", {}, "weights tell 80 classes apart"),
    (build_detector, "keypointrcnn_resnet50_fpn", 2, "DEFAULT", {}, "weights tell 1 classes apart"),
    (build_segmentation, "lraspp_mobilenet_v3_large", 3, "DEFAULT", {}, "weights tell 21 classes.*weights_backbone"),
    (build_segmentation, "lraspp_mobilenet_v3_large", 21, "COCO_V9", {}, "expected DEFAULT or one of COCO_WITH_VOC"),
    (build_segmentation, "lraspp_mobilenet_v3_large", 3, None, {"aux_loss": 1}, "takes no aux_loss"),
    (build_segmentation, "lraspp_mobilenet_v3_large", 3, None, {"weight_backbone": None}, "Did you mean weights_backb"),
    (build_detector, "fcos_resnet50_fpn", 3, None, {"min_sise": 64}, "takes no min_sise. Did you mean min_size"),
    (build_detector, "ssdlite320_mobilenet_v3_large", 3, None, {"foo": 1}, "takes no foo"),
]


@pytest.mark.parametrize(("build", "name", "classes", "weights", "kwargs", "message"), REFUSED)
def test_what_cannot_be_built_is_told_without_a_download(
    build: Callable[..., BuiltModel],
    name: str,
    classes: int,
    weights: str | None,
    kwargs: dict[str, int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    with pytest.raises(UserError, match=message):
        build(name, classes, weights, kwargs)
