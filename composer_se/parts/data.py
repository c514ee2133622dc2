"""The data sets that a recipe can name: what is known of each before its images are read.

To add one, write a function in `image_sets.py` that opens a split and list it in `DATASETS`. Its arguments are those of
the recipe. A recipe can also name a function of the user's.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from composer_se.errors import UserError, did_you_mean, one_line
from composer_se.parts.image_sets import (
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    image_folder,
    imagenet,
    streaming,
    synthetic,
)
from composer_se.parts.image_tree import count_tree_classes, find_tree_fault
from composer_se.parts.loaders import Images, SeededImages, Split
from composer_se.parts.own_parts import own_part

__all__ = ["DATASETS", "DataSet", "find_dataset", "image_size"]


@dataclass(frozen=True)
class DataSet:
    """A data set that a recipe can name.

    Attributes:
        open: A function of `train` and the recipe's arguments that makes a split.
        layout: The files that the data set reads, for the reference page.
        count_classes: A function of the recipe's arguments that returns the number of classes, or None if it is unknown
            before the images are read.
        image_size: Height and width in pixels of the images that a network gets. None: the argument `image_size`.
        find_fault: A function of `train` and the recipe's arguments, called before anything is built. It returns the
            name of the wrong argument and the fault, or None.
        shared: Names of the arguments that divide the images into the two splits. Both splits need the same values.
    """

    open: Callable[..., Split]
    layout: str
    count_classes: Callable[[Mapping[str, Any]], int | None]
    image_size: int | None = None
    find_fault: Callable[[bool, Mapping[str, Any]], tuple[str, str] | None] = lambda train, arguments: None
    shared: tuple[str, ...] = ()


def find_dataset(name: str, path: str) -> DataSet:
    """Finds a data set by its name.

    Args:
        name: A key of `DATASETS`, or `package.module:name` of a function or class of the user's.
        path: The key path of the name, for the messages.

    Raises:
        UserError: If the name is unknown, or the user's module, function or class can't be used.
    """
    if ":" in name:
        return _own_dataset(name, path)
    if name not in DATASETS:
        raise UserError(f"{path}: unknown data set {name!r}{did_you_mean(name, DATASETS)}")
    return DATASETS[name]


def image_size(section: Mapping[str, Any]) -> int | None:
    """Height and width in pixels of a recipe's images, or None if a data set of the user's has no `image_size`.

    Args:
        section: The recipe's `train_dataset` or `eval_dataset`.
    """
    dataset = find_dataset(section["name"], "name")
    if dataset.image_size:
        return dataset.image_size
    argument = inspect.signature(dataset.open).parameters.get("image_size")
    size = section.get("image_size", argument and argument.default)
    return size if isinstance(size, int) else None


def _no_streaming(train: bool, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
    if importlib.util.find_spec("streaming"):
        return None
    return "name", "streaming needs mosaicml-streaming; install it with pip install 'composer-se[streaming]'"


_IMAGENET_ROOT = inspect.signature(imagenet).parameters["root"].default
_DOWNLOADED = "downloaded to `root` unless it is there, in torchvision's layout"

DATASETS = {
    "digits": DataSet(digits, "none, scikit-learn brings the images along", lambda _: 10, 8),
    "fashion_mnist": DataSet(
        fashion_mnist, f"{_DOWNLOADED}; or a folder with the four original `*-ubyte.gz` files themselves", lambda _: 10
    ),
    "cifar10": DataSet(cifar10, _DOWNLOADED, lambda _: 10, 32),
    "cifar100": DataSet(cifar100, _DOWNLOADED, lambda _: 100, 32),
    "image_folder": DataSet(
        image_folder,
        "`root/train/CLASS/*` and `root/val/CLASS/*`, or `root/CLASS/*` for all images; of any size",
        count_tree_classes,
        find_fault=find_tree_fault,
        shared=("val_fraction", "split_seed"),
    ),
    "imagenet": DataSet(
        imagenet,
        "`root/train/CLASS/*` and `root/val/CLASS/*`, images of any size; classes are numbered by name",
        functools.partial(count_tree_classes, root=_IMAGENET_ROOT),
        find_fault=functools.partial(find_tree_fault, root=_IMAGENET_ROOT),
    ),
    "streaming": DataSet(
        streaming,
        "shards in MDS format with the columns `x` (an image) and `y` (its class), in `remote/split` or `local/split`; "
        "needs `pip install 'composer-se[streaming]'`",
        lambda _: None,
        find_fault=_no_streaming,
    ),
    "synthetic": DataSet(synthetic, "none, made up in memory", lambda arguments: arguments.get("num_classes", 1000)),
}


def _own_dataset(name: str, path: str) -> DataSet:
    """The user's own data set: a function or class that takes `train` and returns the data set."""
    make = own_part(name, path, "a map-style torch.utils.data.Dataset", _is_map_style)
    if "train" not in inspect.signature(make).parameters:
        raise UserError(f"{path}: {name} takes no argument train, which is false for the held-out images; add it")

    @functools.wraps(make)
    def open_own(**arguments: Any) -> Images:
        images = make(**arguments)
        try:
            image, label = SeededImages(images, None, seed=0)[0]
        except Exception as error:  # whatever the user's data set does
            raise UserError(
                f"{path}: {name} fails at its first image ({type(error).__name__}: {one_line(error)})"
            ) from error
        if not isinstance(image, torch.Tensor) or image.dim() != 3 or not isinstance(label, int | np.integer):
            got = f"of shape {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
            raise UserError(
                f"{path}: {name} yields ({got}, {type(label).__name__}), expected a tensor (C, H, W) and the number of "
                "its class, an int"
            )
        classes = getattr(images, "classes", None)
        return Images(images, None, True, [str(name) for name in classes] if isinstance(classes, list) else None)

    return DataSet(open_own, "", lambda _: None)


def _is_map_style(made: Any) -> bool:
    return isinstance(made, Dataset) and hasattr(made, "__len__") and not isinstance(made, IterableDataset)
