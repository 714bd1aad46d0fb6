"""Pictures as 8-bit pixels: converted by their depth, and the way up that their EXIF data say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from bnre_exp.errors import UserError

_ORIENTATION = 0x0112  # EXIF: 1 is upright
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF


def _opened(path: str | Path) -> Image.Image:
    """As Pillow opens it. Ultralytics puts another function in the place of ``Image.open``, which tries to install
    packages where a file is no picture, and keeps Pillow's."""
    patches = sys.modules.get("ultralytics.utils.patches")
    found: Image.Image = getattr(patches, "_image_open", Image.open)(path)
    return found


def open_picture(path: str | Path) -> Image.Image:
    """The picture of a file, decoded, in the file's own mode: how it becomes 8-bit pixels depends on that.

    Raises what PIL raises for a file that is no picture, and UserError for one that PIL would garble.
    """
    with _opened(path) as image:
        is_raw_tiff = image.format == "TIFF" and any(tile[0] == "raw" for tile in getattr(image, "tile", ()))
        if is_raw_tiff and image.size[0] != image.size[1] and _orientation(image) in range(5, 9):
            raise UserError(  # Pillow 13.0 takes its height for its width
                "dataset: an uncompressed TIFF picture that lies on its side is garbled by PIL. Save it upright, or "
                "compressed."
            )
        image.load()
    return image


def open_rgb(path: str | Path) -> Image.Image:
    """The same as RGB of 8 bits, which torchvision's own loader gives: it cuts 16 bits and floats off, and turns
    nothing."""
    rgb: Image.Image = v2.functional.to_pil_image(picture_pixels(open_picture(path))).convert("RGB")
    return rgb


def check_header(path: str | Path) -> None:
    """Raise what PIL raises for a file that is no picture, too large, or (PNG) damaged. Pixels are not decoded."""
    with _opened(path) as image:
        image.verify()


def picture_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture, the way up that its EXIF data say. Pixels are not decoded."""
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in range(5, 9) else (width, height)


def picture_pixels(image: Image.Image) -> Tensor:
    """uint8 ``[C, H, W]``, C = 1 (grayscale) or 3 (RGB), of a PIL image, turned as its EXIF data say.

    16 bits are scaled to 8, floats must lie in [0, 1], and what is transparent is laid over white. Raises UserError
    for a mode that cannot be converted, and where it is not known which value is white.
    """
    upright = ImageOps.exif_transpose(image) if _orientation(image) in range(2, 9) else image
    if upright.mode == "F" or upright.mode.startswith("I"):
        return _scaled(np.asarray(upright), _white(image), getattr(image, "tag_v2", {}).get(_PHOTOMETRIC))
    gray = upright.mode in ("1", "L", "LA")
    try:
        if upright.has_transparency_data:
            opaque = Image.new("RGBA", upright.size, "white")
            opaque.alpha_composite(upright.convert("RGBA"))
            upright = opaque.convert("RGB")
        pixels: Tensor = v2.functional.pil_to_tensor(upright.convert("L" if gray else "RGB"))
    except ValueError as error:
        raise UserError(f"dataset: a picture of mode {image.mode} cannot be converted to RGB: {error}.") from error
    return pixels


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF data are written by many devices, and PIL stumbles over damaged ones in many ways
        return 1


def _white(image: Image.Image) -> float:
    """The value of white in a picture of integers of more than 8 bits, or of floats."""
    if image.mode == "F":
        return 1.0
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))  # TIFF has pictures of 12 bits too
        return float(2 ** bits[0] - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # PIL reads 16 bits into 32 there
        return 65535.0
    raise UserError(
        f"dataset: a picture of mode {image.mode} (32-bit integers): it is not known which value is white. Save it "
        "with 8 or 16 bits, or return a uint8 tensor."
    )


def _scaled(values: np.ndarray, white: float, photometric: int | None) -> Tensor:
    fractions = values.astype(np.float64) / white
    if not (np.isfinite(fractions).all() and fractions.min() >= 0 and fractions.max() <= 1):
        raise UserError(
            f"dataset: a picture of {values.dtype} has values from {values.min():.6g} to {values.max():.6g}; expected "
            f"0 (black) to {white:.6g} (white). Save it with 8 or 16 bits, or as fractions of white."
        )
    if photometric == _WHITE_IS_ZERO:  # PIL turns pictures of 8 bits only
        fractions = 1 - fractions
    return torch.from_numpy(np.rint(fractions * 255).astype(np.uint8)).unsqueeze(0)
