"""Datasets and their loaders. Configurations name the datasets here: ``bnre_exp.data.digits``."""

from bnre_exp.data.annotations import coco, yolo_folder
from bnre_exp.data.datasets import ImageTensors, cifar10, cifar100, digits, fashion_mnist, image_folder, imagenet
from bnre_exp.data.loaders import Loaders, build_loaders, check_labels
from bnre_exp.data.pairs import image_masks, image_pairs, oxford_pet, voc
from bnre_exp.data.preprocess import Preprocessing, resolve_preprocessing
from bnre_exp.data.scenes import digit_scenes
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
    "coco",
    "digit_scenes",
    "digits",
    "fashion_mnist",
    "image_folder",
    "image_masks",
    "image_pairs",
    "imagenet",
    "oxford_pet",
    "resolve_preprocessing",
    "voc",
    "yolo_folder",
]
