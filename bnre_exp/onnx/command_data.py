"""Training data for the command line: arrays, folders of images, and the data sets that come along."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from torch.utils.data import Dataset

from bnre_exp.data.loaders import build_loaders
from bnre_exp.data.pictures import open_picture
from bnre_exp.data.preprocess import Preprocessing, stored_preprocessing
from bnre_exp.data.spec import DataSpec
from bnre_exp.errors import UserError

NAMED = ("digits", "fashion_mnist", "cifar10", "cifar100")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class ArrayBatches:
    """Batches of arrays that share their first axis, in a new order each time, from the seed."""

    def __init__(self, arrays: dict[str, np.ndarray], batch_size: int, seed: int) -> None:
        self.arrays, self.batch_size = arrays, batch_size
        self.generator = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[Any]:
        count = len(next(iter(self.arrays.values())))
        order = self.generator.permutation(count)
        for start in range(0, max(1, count - self.batch_size + 1), self.batch_size):  # full ones, unless there is none
            chosen = np.sort(order[start : start + self.batch_size])
            batch = {name: array[chosen] for name, array in self.arrays.items()}
            yield batch.get("", batch)


class ImageFiles(Dataset[tuple[Any, int]]):
    """The images of a folder and the folders in it, all of class 0."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.imgs = [(str(path), 0) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open_picture(self.paths[index]), 0


def image_files(train: bool, root: str) -> ImageFiles:
    """The images below ``root``, whatever ``train`` is."""
    paths = sorted(path for path in Path(root).rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if len(paths) < 2:
        raise UserError(f"--data {root}: expected a folder with at least two images ({', '.join(IMAGES)}).")
    return ImageFiles(paths)


def batches_of(model: onnx.ModelProto, options: argparse.Namespace) -> Iterable[Any]:
    """The batches that ``--data`` and its companions describe.

    Raises ``UserError`` if there is no such data, or a mean is needed and not known.
    """
    path = Path(options.data)
    if path.suffix in (".npy", ".npz") and (path.is_file() or not path.exists()):
        return ArrayBatches(_arrays(path), options.batch_size, options.seed)
    if options.data not in NAMED and not path.is_dir():
        raise UserError(
            f"--data {options.data}: expected an .npy or .npz file, a folder of images, or one of {', '.join(NAMED)}."
        )
    target = f"bnre_exp.data.{options.data}" if options.data in NAMED else f"{__name__}.image_files"
    spec = DataSpec(
        target, root=None if options.data in NAMED else options.data, seed=options.seed, batch_size=options.batch_size,
        eval_batch_size=options.batch_size, val_fraction=0.0, in_memory=options.data in NAMED,
    )  # fmt: skip
    loaders = build_loaders(spec, preprocessing=_preprocessing(model, options))
    return loaders.fresh("reestimation")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except Exception as error:  # numpy has many ways to refuse a file
        raise UserError(f"--data {path} is no array file of numpy's ({error}).") from error
    counts = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    if len(counts) != 1 or counts == {0}:
        raise UserError(f"--data {path}: expected arrays [images, ...] with an equal number of images, at least one.")
    return arrays


def _preprocessing(model: onnx.ModelProto, options: argparse.Namespace) -> Preprocessing:
    shape = _image_shape(model)
    stored = stored_preprocessing({item.key: item.value for item in model.metadata_props})
    known = stored.describe() if stored is not None else _defaults(options.data)
    mean, std = options.mean or known.get("mean"), options.std or known.get("std")
    if mean is None or std is None:
        raise UserError("--data is a folder of images: give --mean and --std, of pixels in [0, 1], as in training.")
    channels = shape[0] or (len(mean) if len(mean) in (1, 3) else 3)
    size = options.image_size or shape[1] or known.get("image_size") or 32
    resize = max(size, int(known.get("resize_size") or size)) if not options.image_size else size
    values = [tuple(x) * channels if len(x) == 1 else tuple(x) for x in (mean, std)]
    return Preprocessing(
        image_size=size, resize_size=resize, mean=values[0], std=values[1], channels=channels,
        interpolation=known.get("interpolation", "bilinear"),
    )  # fmt: skip


def _image_shape(model: onnx.ModelProto) -> tuple[int | None, int | None]:
    """Channels and height of a model's only input, where it says."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [item for item in model.graph.input if item.name not in weights]
    dims = list(inputs[0].type.tensor_type.shape.dim) if len(inputs) == 1 else []
    if len(dims) != 4:
        raise UserError("Image data are for models with one input [N, C, H, W]; give an .npy or .npz file.")
    return dims[1].dim_value or None, dims[2].dim_value or None


def _defaults(name: str) -> dict[str, Any]:
    """Mean and deviation of a data set that comes along, from its configuration file."""
    package = Path(__file__).parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        file = folder / "dataset" / f"{name}.yaml"
        if name in NAMED and file.exists():
            settings = yaml.safe_load(file.read_text())
            return {"mean": settings.get("default_mean", [0.5]), "std": settings.get("default_std", [0.5])}
    return {}
