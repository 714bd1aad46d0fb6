"""From a decoded image to what the network is fed: resize, crop, augment, normalise. Pure functions on tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from bnre_exp.data.pictures import picture_pixels
from bnre_exp.errors import UserError

# Images of 28x28 and 32x32 are resized this many at a time: large enough to be fast, small enough for the caches.
_RESIZE_CHUNK = 4096

FITS = ("crop", "pad", "cut")

_LONGEST = 1000  # an image's longer side, in its shorter sides

METADATA = "bnre_exp.preprocessing"  # entry of an exported model's metadata: Preprocessing.describe() as JSON
CLASSES = "bnre_exp.classes"  # another entry: the names of the classes, in order, as JSON

INTERPOLATIONS = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "nearest": InterpolationMode.NEAREST_EXACT,
}


@dataclass(frozen=True)
class Preprocessing:
    """How images become the network's input.

    ``resize_size``: the shorter side before the centre crop [pixels]. ``image_size``: height and width after it
    [pixels]. ``mean``, ``std``: one value per channel, of pixels in [0, 1]. ``interpolation``: bilinear, bicubic or
    nearest. ``channels``: of the network's input; grayscale images are expanded to 3. ``fit``: how an image gets its
    size: "crop": its shorter side is resized and its centre cut out; "pad": its longer side is resized to
    ``image_size`` and the rest is grey, so that nothing is lost; "cut": a window, nothing is resized. Raises UserError
    where these contradict each other.
    """

    image_size: int
    resize_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    channels: int = 3
    fit: str = "crop"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise UserError(f"preprocessing: fit {self.fit!r} is unknown; expected one of {', '.join(FITS)}.")
        if self.resize_size < self.image_size:
            raise UserError(
                f"preprocessing: images resized to {self.resize_size} pixels cannot be cropped to {self.image_size}; "
                "expected resize_size >= image_size."
            )
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise UserError(f"preprocessing: interpolation {self.interpolation!r} is unknown; expected one of {known}.")
        if self.channels not in (1, 3):
            raise UserError(
                f"preprocessing: networks of {self.channels} input channels are not served; expected 1 or 3."
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise UserError(f"preprocessing: {name} has {len(values)} values for {self.channels} channels.")

    def describe(self) -> dict[str, Any]:
        """Plain values by name, for logging."""
        return asdict(self)


def stored_preprocessing(metadata: Mapping[str, str]) -> Preprocessing | None:
    """What a model that bnre_exp exported says of its preprocessing; None if it says nothing, or nothing of use."""
    try:
        known = json.loads(metadata[METADATA])
        return Preprocessing(**{**known, "mean": tuple(known["mean"]), "std": tuple(known["std"])})
    except (KeyError, TypeError, ValueError):
        return None


def _expand(values: Sequence[float], channels: int, setting: str) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) == 1:
        return numbers * channels
    if len(numbers) != channels:
        raise UserError(f"{setting}={list(numbers)}: expected one value, or {channels} (one per channel).")
    return numbers


def resolve_preprocessing(
    from_weights: Preprocessing | None,
    *,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    default_image_size: int,
    default_mean: Sequence[float],
    default_std: Sequence[float],
    channels: int | None = None,
    fit: str = "crop",
) -> Preprocessing:
    """The preprocessing to use: explicit settings win, then the weights', then the dataset's defaults.

    An explicit ``image_size`` [pixels] scales the weights' ``resize_size`` with it; without weights the shorter side
    is resized to ``image_size`` itself, so that nothing of a square image is cut off. A ``mean`` or ``std`` of one
    value holds for all channels. channels: of the network's input, None: as the weights say, else 3. fit: as
    :class:`Preprocessing` has it. Raises UserError on another number of values.
    """
    base = from_weights
    channels = channels or (base.channels if base else 3)
    size = image_size or (base.image_size if base else default_image_size)
    resize = max(size, round(size * base.resize_size / base.image_size)) if base else size
    means = mean if mean is not None else (base.mean if base else default_mean)
    stds = std if std is not None else (base.std if base else default_std)
    return Preprocessing(
        image_size=size,
        resize_size=resize,
        mean=_expand(means, channels, "dataset.mean"),
        std=_expand(stds, channels, "dataset.std"),
        interpolation=base.interpolation if base else "bilinear",
        channels=channels,
        fit=fit,
    )


def to_uint8(image: Any) -> Tensor:
    """A PIL image or a uint8 tensor ``[C, H, W]`` (or ``[H, W]``) as a uint8 tensor with C = 1 (grayscale) or 3 (RGB).

    PIL images are converted by :func:`~bnre_exp.data.pictures.picture_pixels`. Raises UserError on anything else: a
    dataset must return images before any transform to float.
    """
    if isinstance(image, Image.Image):
        return _checked(picture_pixels(image))
    if not isinstance(image, Tensor):
        raise UserError(
            f"dataset: an image is a {type(image).__name__}; expected a PIL image or a uint8 tensor [C, H, W]."
        )
    image = image.unsqueeze(0) if image.ndim == 2 else image
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise UserError(
            f"dataset: an image is a {image.dtype} tensor of shape {list(image.shape)}; expected a PIL image or a "
            "uint8 tensor [C, H, W] with C = 1 or 3. Leave float conversion and normalisation to dataset.mean and std."
        )
    return _checked(image)


def _checked(image: Tensor) -> Tensor:
    """The image itself; UserError if there is nothing in it, or its resized long side would not fit into memory."""
    shorter, longer = sorted(image.shape[-2:])
    if shorter < 1 or longer > _LONGEST * shorter:
        raise UserError(
            f"dataset: an image has {image.shape[-2]} x {image.shape[-1]} pixels; expected at least 1 x 1, and one "
            f"side at most {_LONGEST} times the other."
        )
    return image


def as_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 ``[..., C, H, W]`` as an image of ``channels`` (1 or 3) channels; a view where it is expanded."""
    if images.shape[-3] == channels:
        return images
    if channels == 3:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    gray: Tensor = v2.functional.rgb_to_grayscale(images)
    return gray


def resize_and_crop(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 ``[..., C, H, W]`` resized (shorter side to ``resize_size``, antialiased) and centre-cropped, as uint8.

    One image or a batch: both go through the same kernel, so preparing in memory changes no pixel.
    """
    size, resize = preprocessing.image_size, preprocessing.resize_size
    if min(images.shape[-2:]) != resize:
        mode = INTERPOLATIONS[preprocessing.interpolation]
        parts = torch.split(images, _RESIZE_CHUNK) if images.ndim == 4 else [images]
        resized = [v2.functional.resize(part, [resize], interpolation=mode, antialias=True) for part in parts]
        images = torch.cat(resized) if images.ndim == 4 else resized[0]
    cropped: Tensor = v2.functional.center_crop(images, [size, size])
    return cropped


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 ``[N, C, H, W]`` as float32 ``[N, channels, H, W]``: pixels in [0, 1] minus mean, divided by std."""
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    pixels = as_channels(images, preprocessing.channels).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(255).sub_(mean).div_(std)


def random_crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 ``[N, C, S, S]``, each image shifted by its own random offset and flipped with probability 1/2.

    Shifts are up to 4 pixels at S = 32 and in proportion elsewhere; what comes in from outside is black.
    """
    count, _, size, _ = images.shape
    pad = max(1, round(4 * size / 32))
    padded = F.pad(images, (pad, pad, pad, pad))
    offsets = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    flip = torch.rand((count, 1), generator=generator) < 0.5
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    crops = windows[torch.arange(count), :, offsets[0, :, 0], offsets[1, :, 0]]
    return torch.where(flip[:, :, None, None], crops.flip(-1), crops)


def random_resized_crop_and_flip(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 ``[C, H, W]`` to ``[C, S, S]``: a random area of 8 to 100 %, resized, flipped with probability 1/2.

    Random numbers come from torch's global generator, which the caller seeds and restores.
    """
    mode = INTERPOLATIONS[preprocessing.interpolation]
    size = preprocessing.image_size
    crop: Tensor = v2.RandomResizedCrop(size, interpolation=mode, antialias=True)(image)
    return crop.flip(-1) if torch.rand(()) < 0.5 else crop
