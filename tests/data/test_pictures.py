"""Pictures of every depth, mode and orientation: the right 8-bit pixels, or a message that says what is wrong."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from bnre_exp.data.pictures import open_picture
from bnre_exp.data.preprocess import to_uint8
from bnre_exp.errors import UserError


def pixels(image: Image.Image, path: Path, **options: Any) -> list[Any]:
    """What is read from the file that PIL writes for an image."""
    image.save(path, **options)
    return to_uint8(open_picture(path)).tolist()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    assert pixels(Image.fromarray(values), tmp_path / f"a.{suffix}") == [[[0, 1, 128, 255]]]


def test_floats_are_fractions_of_white(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.25, 0.5, 1.0]], dtype=np.float32)
    assert pixels(Image.fromarray(values), tmp_path / "a.tif") == [[[0, 64, 128, 255]]]


def test_a_tiff_may_have_white_at_zero_also_with_16_bits(tmp_path: Path) -> None:
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo=tags)
    assert Image.open(tmp_path / "a.tif").tag_v2[262] == 0  # type: ignore[attr-defined]
    assert to_uint8(open_picture(tmp_path / "a.tif")).tolist() == [[[255, 127, 0]]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0.0, 300.0]], dtype=np.float32), "values from 0 to 300; expected 0 .black. to 1"),
        (np.array([[-0.1, 0.5]], dtype=np.float32), "values from -0.1"),
        (np.array([[0.5, np.nan]], dtype=np.float32), "nan"),
        (np.array([[0.5, np.inf]], dtype=np.float32), "inf"),
        (np.array([[0, 70000]], dtype=np.int32), "32-bit integers"),
    ],
)
def test_where_white_is_not_known_a_picture_is_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=message):
        to_uint8(open_picture(tmp_path / "a.tif"))


CORNERS = np.array([[[10], [20]], [[30], [40]], [[50], [60]]], dtype=np.uint8)[:, :, 0]  # 3 high, 2 wide


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [[10, 20], [30, 40], [50, 60]]),
        (2, [[20, 10], [40, 30], [60, 50]]),
        (3, [[60, 50], [40, 30], [20, 10]]),
        (6, [[50, 30, 10], [60, 40, 20]]),
        (8, [[20, 40, 60], [10, 30, 50]]),
    ],
)
@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("tif", {"compression": "tiff_lzw"})])
def test_pictures_are_turned_as_their_exif_says(
    tmp_path: Path, suffix: str, options: dict[str, Any], orientation: int, expected: list[Any]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixels(Image.fromarray(CORNERS), tmp_path / f"a.{suffix}", exif=exif, **options) == [expected]


def test_a_picture_that_pil_garbles_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with pytest.raises(UserError, match="uncompressed TIFF picture that lies on its side"):
        pixels(Image.fromarray(CORNERS), tmp_path / "a.tif", exif=exif)
    assert pixels(Image.fromarray(CORNERS[:2]), tmp_path / "b.tif", exif=exif) == [[[30, 10], [40, 20]]]


def test_a_users_own_loader_need_not_turn_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        converted = image.convert("RGB")
    assert to_uint8(converted).shape == (3, 30, 20)
    assert converted.size == (30, 20)  # the user's image stays as it is


def test_damaged_exif_leaves_a_picture_as_it_is(tmp_path: Path) -> None:
    image = Image.fromarray(CORNERS)
    image.info["exif"] = b"Exif\x00\x00no TIFF header"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert to_uint8(image).tolist() == [CORNERS.tolist()]


def palette(transparent: bool) -> tuple[Image.Image, dict[str, Any]]:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 0, 255, 0])
    image.putpixel((1, 0), 1)
    return image, {"transparency": 1} if transparent else {}


def test_palettes(tmp_path: Path) -> None:
    image, options = palette(transparent=False)
    assert pixels(image, tmp_path / "a.png", **options) == [[[200, 0]], [[100, 255]], [[50, 0]]]
    image, options = palette(transparent=True)
    assert pixels(image, tmp_path / "b.png", **options) == [[[200, 255]], [[100, 255]], [[50, 255]]]


def test_what_is_transparent_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 100, 50, 255], [9, 9, 9, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    assert pixels(Image.fromarray(rgba), tmp_path / "a.png") == [[[200, 255, 204]], [[100, 255, 204]], [[50, 255, 204]]]
    gray = Image.fromarray(np.array([[[200, 255], [9, 0], [0, 51]]], dtype=np.uint8), mode="LA")
    assert pixels(gray, tmp_path / "b.png") == [[[200, 255, 204]]]


def test_one_bit_and_cmyk(tmp_path: Path) -> None:
    assert pixels(Image.fromarray(np.array([[True, False]])), tmp_path / "a.png") == [[[255, 0]]]
    cmyk = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], dtype=np.uint8), mode="CMYK")
    assert pixels(cmyk, tmp_path / "b.tif") == [[[255, 255, 0]], [[255, 0, 0]], [[255, 0, 0]]]


def test_what_cannot_be_converted_is_named() -> None:
    with pytest.raises(UserError, match="mode La cannot be converted"):
        to_uint8(Image.new("La", (2, 2)))


@pytest.mark.parametrize("shape", [(3, 0, 4), (1, 5, 0), (1, 2, 2001)])
def test_images_that_cannot_be_resized_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"{shape[1]} x {shape[2]} pixels"):
        to_uint8(torch.zeros(shape, dtype=torch.uint8))
