"""Datasets and their loaders. Configurations name the datasets here: ``bnre_exp.data.digits``."""

from bnre_exp.data.datasets import ImageTensors, cifar10, cifar100, digits, fashion_mnist, image_folder, imagenet
from bnre_exp.data.loaders import Loaders, build_loaders, check_labels
from bnre_exp.data.preprocess import Preprocessing, resolve_preprocessing
from bnre_exp.data.spec import DataSpec

__all__ = [
    "DataSpec",
    "ImageTensors",
    "Loaders",
    "Preprocessing",
    "build_loaders",
    "check_labels",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "image_folder",
    "imagenet",
    "resolve_preprocessing",
]
