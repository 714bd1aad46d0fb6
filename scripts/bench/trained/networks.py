"""Networks of the table of trained networks that no package builds by a name alone."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN

PIXELS = 64  # of the scenes' sides
SIZES = ((8,), (16,), (32,), (64,))  # of objects, for each level of the pyramid [pixels]


def fcos(num_classes: int = 10) -> FCOS:
    """FCOS of torchvision on ResNet18 with BN and a pyramid of four levels of 64 channels."""
    levels = {"layer1": "0", "layer2": "1", "layer3": "2"}
    backbone = BackboneWithFPN(resnet18(weights=None), levels, in_channels_list=[64, 128, 256], out_channels=64)
    anchors = AnchorGenerator(sizes=SIZES, aspect_ratios=((1.0,),) * len(SIZES))
    return FCOS(backbone, num_classes, anchor_generator=anchors, min_size=PIXELS, max_size=PIXELS)


def unet(num_classes: int = 11) -> nn.Module:
    """U-Net of segmentation_models_pytorch on MobileNetV2 down to an eighth of the image's sides."""
    import segmentation_models_pytorch as smp

    return smp.Unet(
        "mobilenet_v2", encoder_depth=3, encoder_weights=None, decoder_channels=(64, 32, 16), in_channels=1,
        classes=num_classes,
    )  # fmt: skip


def deeplabv3plus(num_classes: int = 11) -> nn.Module:
    """DeepLabV3+ of segmentation_models_pytorch on MobileNetV2."""
    import segmentation_models_pytorch as smp

    return smp.DeepLabV3Plus(
        "mobilenet_v2", encoder_weights=None, encoder_output_stride=8, in_channels=1, classes=num_classes
    )


class DnCNN(nn.Module):
    """A denoiser that tells the noise of a gray image, by convolutions with BN (Zhang and others, 2017); smaller."""

    def __init__(self, depth: int = 6, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.noise = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.noise(x)


class Pose(nn.Module):
    """Heatmaps of keypoints, a fourth as large as the image: an encoder and transposed convolutions with BN (Xiao and
    others, 2018); smaller."""

    def __init__(self, num_keypoints: int = 4, width: int = 24) -> None:
        super().__init__()

        def down(inputs: int, outputs: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
            depthwise = nn.Conv2d(outputs, outputs, 3, 1, 1, groups=outputs, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU(), depthwise, nn.BatchNorm2d(outputs), nn.ReLU()]

        def up(inputs: int, outputs: int) -> list[nn.Module]:
            conv = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

        widths = (1, width, 2 * width, 4 * width, 4 * width)
        encoder = [layer for inputs, outputs in zip(widths, widths[1:]) for layer in down(inputs, outputs)]
        decoder = [*up(4 * width, 2 * width), *up(2 * width, 2 * width)]
        self.body = nn.Sequential(*encoder, *decoder)
        self.head = nn.Conv2d(2 * width, num_keypoints, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))
