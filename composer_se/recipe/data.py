"""The data sets that a recipe can name: what each reads, how large its images are, and how they become tensors.

To add one, write a function that opens a split and list it in `DATASETS`. Its arguments are those of the recipe.
"""

from __future__ import annotations

import gzip
import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torchvision.datasets
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from composer_se.errors import UserError, did_you_mean, one_line
from composer_se.recipe.loaders import Images, Split, StreamedImages

__all__ = ["DATASETS", "DataSet", "find_dataset", "image_size"]


@dataclass(frozen=True)
class DataSet:
    """A data set that a recipe can name.

    Attributes:
        open: Makes a split, called with `train` and the arguments that the recipe gives.
        layout: The files that it reads, for the reference page.
        image_size: Height and width in pixels of what a network gets; None where the argument `image_size` says it.
        find_fault: Called with `train` and the recipe's arguments before anything is built. Returns the argument that
            is wrong and what is wrong with it, or None.
    """

    open: Callable[..., Split]
    layout: str
    image_size: int | None = None
    find_fault: Callable[[bool, Mapping[str, Any]], tuple[str, str] | None] = lambda train, arguments: None


def find_dataset(name: str, path: str) -> DataSet:
    """The data set of a name.

    Raises:
        UserError: Unknown name.
    """
    if name not in DATASETS:
        raise UserError(f"{path}: unknown data set {name!r}{did_you_mean(name, DATASETS)}")
    return DATASETS[name]


def image_size(section: Mapping[str, Any]) -> int:
    """Height and width in pixels of the images of a recipe's data.

    Args:
        section: The recipe's `train_dataset` or `eval_dataset`.
    """
    dataset = find_dataset(section["name"], "name")
    if dataset.image_size:
        return dataset.image_size
    return section.get("image_size", inspect.signature(dataset.open).parameters["image_size"].default)


def digits(train: bool) -> Images:
    """The 1797 handwritten digits of scikit-learn, 8×8, grey, 10 classes.

    The held-out fifth (360 images) is drawn once, stratified by class, with a seed that no recipe changes: every
    run is measured on the same images. Augmented by small rotations, shifts and scalings; no flips, which would turn
    a digit into none.
    """
    from sklearn.datasets import load_digits  # takes a second, for this data set alone
    from sklearn.model_selection import train_test_split

    data = cast(Any, load_digits())
    train_indices, held_out = train_test_split(
        np.arange(len(data.target)), test_size=360, stratify=data.target, random_state=0
    )
    indices = np.sort(train_indices if train else held_out)
    pixels = np.round(data.images[indices] * (255 / 16)).astype(np.uint8)
    moved = v2.RandomAffine(
        [-10, 10], translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
    )
    transform = _to_tensor([moved] if train else [], (0.3053,), (0.3760,))
    return Images(_ArrayImages(pixels, data.target[indices]), transform, False, [str(digit) for digit in range(10)])


def fashion_mnist(train: bool, root: str = "data", padding: int = 4) -> Images:
    """Fashion-MNIST: 60,000 and 10,000 images of clothing, 28×28, grey, 10 classes.

    Args:
        train: The training images, or the held-out ones.
        root: The folder that holds the data, or that they are downloaded to.
        padding: Pixels on each side of the training images from which crops are drawn; 0 for no crops.

    Raises:
        ValueError: `padding` is negative.
    """
    if padding < 0:
        raise ValueError(f"padding must be 0 or more, got {padding}")
    transform = _to_tensor(_pad_crop_flip(28, padding) if train else [], (0.2860,), (0.3530,))
    prefix = Path(root) / ("train" if train else "t10k")
    if Path(f"{prefix}-images-idx3-ubyte.gz").is_file():
        files = (Path(f"{prefix}-{content}-ubyte.gz") for content in ("images-idx3", "labels-idx1"))
        images: Dataset = _ArrayImages(*map(_read_idx, files))
    else:
        images = _downloaded("FashionMNIST", root, train)
    return Images(images, transform, True, torchvision.datasets.FashionMNIST.classes)


def cifar10(train: bool, root: str = "data") -> Images:
    """CIFAR-10: 50,000 and 10,000 images, 32×32, 10 classes.

    Args:
        train: The training images, or the held-out ones.
        root: The folder that holds the data, or that they are downloaded to.
    """
    return _cifar("CIFAR10", train, root, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(train: bool, root: str = "data") -> Images:
    """CIFAR-100: 50,000 and 10,000 images, 32×32, 100 classes.

    Args:
        train: The training images, or the held-out ones.
        root: The folder that holds the data, or that they are downloaded to.
    """
    return _cifar("CIFAR100", train, root, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def imagenet(train: bool, root: str = "imagenet", image_size: int = 224) -> Images:
    """A tree of image files, such as ImageNet's, or your own: one folder of images per class.

    Training takes random resized crops and flips, evaluation the central crop of 7/8.

    Args:
        train: `root/train` or `root/val`.
        root: The folder of the tree.
        image_size: Height and width of the crops.
    """
    images = _ImageFiles(Path(root) / ("train" if train else "val"))
    return Images(images, _imagenet_transform(train, image_size), True, images.classes)


def streaming(
    train: bool,
    remote: str | None = None,
    local: str | None = None,
    split: str | None = None,
    image_size: int = 224,
    cache_limit: str | None = None,
    predownload: int | None = None,
    num_canonical_nodes: int | None = None,
    shuffle_block_size: int = 262144,
) -> StreamedImages:
    """Images streamed from object storage, augmented as those of `imagenet`.

    Args:
        train: Augment the images.
        remote: Place of the shards, such as `s3://bucket/folder`. None: all of them are in `local`.
        local: Folder in which each node keeps the shards it fetched.
        split: Subfolder of both.
        image_size: Height and width of the crops.
        cache_limit: The most that `local` may hold, such as `100gb`. None: no limit.
        predownload: Images to fetch ahead per worker. None: mosaicml-streaming's choice.
        num_canonical_nodes: Fixes the order of images for resuming on another number of nodes.
        shuffle_block_size: Images that are shuffled together.

    Raises:
        ValueError: Neither `remote` nor `local` is given.
    """
    if remote is None and local is None:
        raise ValueError("set remote (where the shards are), or local (when all of them are here)")
    return StreamedImages(
        {
            "remote": remote,
            "local": local,
            "split": split,
            "cache_limit": cache_limit,
            "predownload": predownload,
            "num_canonical_nodes": num_canonical_nodes,
            "shuffle_block_size": shuffle_block_size,
            "transform": _imagenet_transform(train, image_size),
        }
    )


def synthetic(
    train: bool, num_samples: int = 1024, image_size: int = 224, num_channels: int = 3, num_classes: int = 1000
) -> Images:
    """Noise, for measuring throughput; the same for both splits.

    Args:
        train: Makes no difference.
        num_samples: Number of images.
        image_size: Height and width.
        num_channels: Channels of an image.
        num_classes: Number of classes.
    """
    del train
    images = _SyntheticImages(num_samples, image_size, num_channels, num_classes)
    return Images(images, None, False, [str(label) for label in range(min(num_samples, num_classes))])


def _no_such_folder(train: bool, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
    folder = Path(str(arguments.get("root", "imagenet"))) / ("train" if train else "val")
    if os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return None
    return "root", f"the folder {str(folder)!r} does not exist; it should hold one folder of images per class"


def _no_streaming(train: bool, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
    if importlib.util.find_spec("streaming"):
        return None
    return "name", "streaming needs mosaicml-streaming; install it with pip install 'composer-se[streaming]'"


_DOWNLOADED = "downloaded to `root` unless it is there, in torchvision's layout"

DATASETS = {
    "digits": DataSet(digits, "none, scikit-learn brings the images along", 8),
    "fashion_mnist": DataSet(
        fashion_mnist, f"{_DOWNLOADED}; or a folder with the four original `*-ubyte.gz` files themselves", 28
    ),
    "cifar10": DataSet(cifar10, _DOWNLOADED, 32),
    "cifar100": DataSet(cifar100, _DOWNLOADED, 32),
    "imagenet": DataSet(
        imagenet,
        "`root/train/CLASS/*` and `root/val/CLASS/*`, images of any size; classes are numbered by name",
        find_fault=_no_such_folder,
    ),
    "streaming": DataSet(
        streaming,
        "shards in MDS format with the columns `x` (an image) and `y` (its class), in `remote/split` or `local/split`; "
        "needs `pip install 'composer-se[streaming]'`",
        find_fault=_no_streaming,
    ),
    "synthetic": DataSet(synthetic, "none, made up in memory"),
}


class _ArrayImages(Dataset):
    """Grey images of shape (N, H, W), uint8, in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


class _ImageFiles(torchvision.datasets.ImageFolder):
    """Names the file of an image that can't be read."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            return super().__getitem__(index)
        except (OSError, SyntaxError, ValueError) as error:  # PIL's, and that of a damaged PNG
            path = self.samples[index][0]
            raise UserError(f"{path}: can't be read ({one_line(error)}); repair or delete this image") from error


class _SyntheticImages(Dataset):
    """Normal noise of shape (C, S, S); image and label are functions of the index."""

    def __init__(self, num_samples: int, image_size: int, num_channels: int, num_classes: int) -> None:
        # A small pool, so that no time goes into drawing noise.
        generator = torch.Generator().manual_seed(0)
        self.pool = torch.randn(16, num_channels, image_size, image_size, generator=generator)
        self.num_samples = num_samples
        self.num_classes = num_classes

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.pool[index % len(self.pool)], index % self.num_classes


def _cifar(cls: str, train: bool, root: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Images:
    """With crops of the image padded by 4, and flips (He et al., https://arxiv.org/abs/1512.03385, section 4.2)."""
    images = _downloaded(cls, root, train)
    return Images(images, _to_tensor(_pad_crop_flip(32, 4) if train else [], mean, std), True, images.classes)


def _downloaded(cls: str, root: str, train: bool) -> Any:
    try:
        return getattr(torchvision.datasets, cls)(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"root {root!r} doesn't hold {cls}, and downloading it there failed ({one_line(error)}); "
            "give a folder that holds it"
        ) from error


def _read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes in the IDX format of MNIST, gzipped."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=dimensions, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _imagenet_transform(train: bool, image_size: int) -> Callable[[Any], Any]:
    steps: list[v2.Transform]
    if train:
        steps = [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(image_size * 256 // 224, antialias=True), v2.CenterCrop(image_size)]
    return _to_tensor(steps, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _pad_crop_flip(size: int, padding: int) -> list[v2.Transform]:
    crop = [v2.RandomCrop(size, padding=padding)] if padding else []
    return [*crop, v2.RandomHorizontalFlip()]


def _to_tensor(steps: Sequence[v2.Transform], mean: tuple[float, ...], std: tuple[float, ...]) -> v1.Compose:
    # The steps are torchvision's v2 transforms. They stand in a v1 `Compose` around a v1 `ToTensor` because that is
    # where Composer's RandAugment, AugMix and ColOut look for the place to insert themselves.
    return v1.Compose([*steps, v1.ToTensor(), v2.Normalize(mean, std)])
