"""How a sample comes into the size that a network is fed, and how it is augmented: its target goes with its image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from bnre_exp.data.preprocess import INTERPOLATIONS, Preprocessing
from bnre_exp.data.samples import IGNORED, Sample
from bnre_exp.errors import UserError

GREY = 114  # what pads images, as detectors are trained with (Ultralytics' letterbox)
SHIFT = 1 / 8  # of the image's side, the furthest that augmentation moves it


def fitted(sample: Sample, how: Preprocessing) -> Sample:
    """A sample in the size that ``how`` says, but for windows of ``fit="cut"``, which :func:`finished` cuts out.

    Raises ``UserError`` where that cannot be done.
    """
    height, width = sample["image"].shape[-2:]
    if how.fit == "cut":
        _check_window(sample, how.image_size)
        return sample
    if "target" in sample and sample["target"].shape[-2:] != sample["image"].shape[-2:]:
        raise UserError("dataset: a target of another size than its image needs dataset.fit=cut.")
    if how.fit == "pad":
        scale = how.image_size / max(height, width)
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
    else:
        scale = how.resize_size / min(height, width)
        size = [max(how.image_size, round(height * scale)), max(how.image_size, round(width * scale))]
    mode = INTERPOLATIONS[how.interpolation]
    if size != [height, width]:
        sample = _each(sample, lambda value: _resized(value, size, mode))
    top, left = (how.image_size - size[0]) // 2, (how.image_size - size[1]) // 2
    if how.fit == "pad":
        sides = [left, top, how.image_size - size[1] - left, how.image_size - size[0] - top]
        return _padded(sample, sides) if any(sides) else sample
    return _window(sample, -top, -left, how.image_size)


def finished(sample: Sample, how: Preprocessing, augment: bool) -> Sample:
    """A fitted sample, cut or augmented: shifted by up to an eighth of its side, and flipped with probability 1/2.

    Samples with keypoints are not flipped: each point has a meaning, such as left or right, and it is not known which
    would have to change places. Points that leave the image stay, outside of it; batches tell them as not seen. Random
    numbers come from torch's global generator, which the caller seeds.
    """
    if how.fit == "cut":
        return _cut(sample, how.image_size, augment)
    if not augment:
        return sample
    size, most = how.image_size, max(1, round(how.image_size * SHIFT))
    top, left = torch.randint(0, 2 * most + 1, (2,)).tolist()
    return _flipped_or_not(_window(_padded(sample, [most] * 4), top, left, size))


def _flipped_or_not(sample: Sample) -> Sample:
    is_flipped = float(torch.rand(())) < 0.5 and "keypoints" not in sample
    return _each(sample, F.horizontal_flip) if is_flipped else sample


def _each(sample: Sample, change: Callable[[Any], Any]) -> Sample:
    return {name: change(part) if isinstance(part, tv_tensors.TVTensor) else part for name, part in sample.items()}


def _resized(value: Any, size: list[int], mode: F.InterpolationMode) -> Any:
    if not isinstance(value, tv_tensors.Mask):
        return F.resize(value, size, interpolation=mode, antialias=True)
    # torchvision takes the first pixel of those that become one, and a mask would lie beside its image.
    nearest = F.resize(value.as_subclass(Tensor)[None], size, interpolation=F.InterpolationMode.NEAREST_EXACT)
    return tv_tensors.wrap(nearest[0], like=value)


def _padded(sample: Sample, sides: list[int]) -> Sample:
    """sides: left, top, right, bottom [pixels]."""

    def padded(value: Any) -> Any:
        is_classes = isinstance(value, tv_tensors.Mask) and value.ndim == 2
        fill = IGNORED if is_classes else 0 if isinstance(value, tv_tensors.Mask) else GREY
        return F.pad(value, sides, fill=float(fill))

    return _each(sample, padded)


def _window(sample: Sample, top: int, left: int, size: int) -> Sample:
    """The part of the sample in a window; objects of which nothing is left are gone."""
    sample = _each(sample, lambda value: F.crop(value, top, left, size, size))
    if "boxes" not in sample:
        return sample
    boxes = F.clamp_bounding_boxes(sample["boxes"])
    plain = boxes.as_subclass(Tensor)
    left_over = (plain[:, 2:] - plain[:, :2] >= 1).all(1)
    chosen = {"labels": sample["labels"][left_over], "boxes": tv_tensors.wrap(plain[left_over], like=boxes)}
    for name in ("masks", "keypoints", "seen"):
        if name in sample:
            part = sample[name]
            kept = part.as_subclass(Tensor)[left_over]
            chosen[name] = tv_tensors.wrap(kept, like=part) if isinstance(part, tv_tensors.TVTensor) else kept
    return {**sample, **chosen}


def _check_window(sample: Sample, size: int) -> None:
    """Raise ``UserError`` for an image that is smaller than the window, or a target that is not a whole number of times
    as large as its image."""
    height, width = sample["image"].shape[-2:]
    if height < size or width < size:
        raise UserError(
            f"dataset: an image has {width} x {height} pixels, and nothing is resized: set dataset.image_size to "
            f"{min(height, width)} or less (or dataset.fit=pad)."
        )
    found = list(sample["target"].shape[-2:]) if "target" in sample else [height, width]
    times = found[1] // width
    if times < 1 or found != [times * height, times * width]:
        raise UserError(
            f"dataset: an image of {width} x {height} pixels has a target of {found[1]} x {found[0]}; expected the "
            "same size, or a whole number of times it."
        )


def _cut(sample: Sample, size: int, is_random: bool) -> Sample:
    """A window of the image, nothing resized, and the same one of the target, which may be larger by a whole number."""
    height, width = sample["image"].shape[-2:]
    top, left = (height - size) // 2, (width - size) // 2
    if is_random:
        top, left = int(torch.randint(height - size + 1, ())), int(torch.randint(width - size + 1, ()))
    cut: Sample = _window({k: v for k, v in sample.items() if k != "target"}, top, left, size)
    if "target" in sample:
        times = sample["target"].shape[-1] // width
        cut["target"] = F.crop(sample["target"], times * top, times * left, times * size, times * size)
    return _flipped_or_not(cut) if is_random else cut
