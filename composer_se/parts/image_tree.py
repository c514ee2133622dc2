"""Trees of image files with one folder per class: their classes and their splits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from composer_se.errors import UserError, one_line

__all__ = ["ImageTree", "count_tree_classes", "find_tree_fault", "split_folder", "split_indices"]


class ImageTree(ImageFolder):
    """The images of a folder of classes, as (image, class number). Classes are numbered in the order of their names.

    Raises:
        UserError: When an image is read that can't be decoded, or has more than 8 bits per channel. The message names
            the file.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, loader=_load)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Hidden folders are no classes."""
        names = _class_names(Path(directory))
        return names, {name: number for number, name in enumerate(names)}

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            return super().__getitem__(index)
        except Exception as error:  # PIL raises many kinds for damaged files, and its own for very large ones
            path = self.samples[index][0]
            fault = "no image of a known format" if isinstance(error, UnidentifiedImageError) else one_line(error)
            raise UserError(f"{path}: can't be read ({fault}); repair or delete this image") from error


def _load(path: str) -> Image.Image:
    with Image.open(path) as image:
        if image.mode == "F" or image.mode.startswith("I"):  # `convert` would cut such pixels off: white images
            raise ValueError(f"its pixels, of mode {image.mode}, have more than 8 bits; convert it to 8 bits")
        return image.convert("RGB")


def split_folder(root: Path, train: bool) -> tuple[Path, bool]:
    """The folder that holds a split's classes, and True if the other split's images are in the same folder."""
    if any(_is_folder(root / split) for split in ("train", "val")):
        return root / ("train" if train else "val"), False
    return root, True


def split_indices(labels: Sequence[int], train: bool, val_fraction: float, seed: int) -> list[int]:
    """The indices of a split's images. The held-out images are drawn from every class, in proportion.

    Args:
        labels: The classes of all images.
        train: True for the images to train on, False for the held-out ones.
        val_fraction: Share of the images to hold out, in (0, 1).
        seed: The seed of the random choice, 0 to 2³² - 1.

    Raises:
        ValueError: If a value is out of range, or a split would have no image.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be above 0 and below 1, got {val_fraction}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"split_seed must be 0 to {2**32 - 1}, got {seed}")
    order = np.random.RandomState(seed).permutation(len(labels))  # the same in every version of NumPy
    order = order[np.argsort(np.asarray(labels)[order], kind="stable")]  # by class, at random within a class
    places = np.arange(len(order))
    held_out = np.floor((places + 1) * val_fraction) > np.floor(places * val_fraction)
    if not 0 < held_out.sum() < len(order):
        raise ValueError(f"val_fraction {val_fraction} of {len(order)} images leaves one split without any")
    return np.sort(order[held_out != train]).tolist()


def count_tree_classes(arguments: Mapping[str, Any], root: str = "") -> int | None:
    """Counts the classes in a tree. Returns None if there are none, or no such folder.

    Args:
        arguments: The arguments of the data set, by name.
        root: Used if the arguments have no `root`.
    """
    folder, _ = split_folder(Path(arguments.get("root", root)), train=True)
    try:
        return len(_class_names(folder)) or None
    except OSError:
        return None


def find_tree_fault(train: bool, arguments: Mapping[str, Any], root: str = "") -> tuple[str, str] | None:
    """Looks for a fault in a tree without reading an image. Returns the name of the wrong argument and the fault."""
    try:
        fault = _find_fault(train, Path(arguments.get("root", root)))
    except OSError as error:  # no permission
        fault = f"can't be read ({one_line(error)})"
    return ("root", fault) if fault else None


def _find_fault(train: bool, top: Path) -> str | None:
    folder, is_whole = split_folder(top, train)
    if not _is_folder(folder):
        where = f"{str(top / 'train')!r} and {str(top / 'val')!r}" if is_whole else repr(str(folder))
        also = f", or in {str(top)!r} itself" if is_whole else ""
        return f"found no folder {where}; put one folder of images per class there{also}"
    names = _class_names(folder)
    if len(names) < 2:
        found = f"one class, {names[0]!r}" if names else "no folder of images"
        return f"{str(folder)!r} holds {found}; expected two classes or more, a folder of images for each"
    for name in names:
        if not _holds_images(folder / name):
            endings = ", ".join(IMG_EXTENSIONS)
            return f"{str(folder / name)!r} holds no image ({endings}); add some, or delete the folder"
    other, _ = split_folder(top, not train)
    if _is_folder(other) and (odd := sorted({*names} ^ {*_class_names(other)})):
        return f"{str(folder)!r} and {str(other)!r} differ: {odd[0]!r} is a class in one of them only"
    return None


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _holds_images(folder: Path) -> bool:
    files = (name for _, _, names in os.walk(folder, followlinks=True) for name in names)
    return any(name.lower().endswith(IMG_EXTENSIONS) for name in files)
