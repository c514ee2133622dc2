"""Data sets by name: each function returns the images of one split with its standard transform."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from composer_se.errors import UserError
from composer_se.recipe import transforms
from composer_se.recipe.messages import did_you_mean, one_line
from composer_se.recipe.streaming_data import StreamedImages, streaming

__all__ = ["DATASETS", "ImageData", "dataset_builder"]


@dataclass(frozen=True)
class ImageData:
    """One split of a data set.

    Attributes:
        images: A map-style data set of (image, label) without transforms.
        transform: What makes a tensor of an image; None where the images are tensors.
        needs_workers: Whether reading an image costs enough to be worth processes of its own.
    """

    images: Dataset
    transform: Callable[[Any], Any] | None
    needs_workers: bool


class ArrayImages(Dataset):
    """Grey images of shape (N, H, W), uint8, in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


class SyntheticImages(Dataset):
    """Normal noise of shape (C, S, S); image and label are functions of the index. For throughput."""

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


def digits(train: bool) -> ImageData:
    """The 1797 handwritten digits of scikit-learn, 8×8, grey, 10 classes; embedded, so nothing is downloaded.

    The held-out fifth (360 images) is drawn once, stratified by class, with a seed that no recipe changes: every
    run is measured on the same images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = cast(Any, load_digits())
    train_indices, held_out = train_test_split(
        np.arange(len(data.target)), test_size=360, stratify=data.target, random_state=0
    )
    indices = np.sort(train_indices if train else held_out)
    pixels = np.round(data.images[indices] * (255 / 16)).astype(np.uint8)
    images = ArrayImages(pixels, data.target[indices])
    return ImageData(images, transforms.digits_transform(train), needs_workers=False)


def fashion_mnist(train: bool, root: str = "data", padding: int = 4) -> ImageData:
    """Fashion-MNIST: 60,000 and 10,000 images of clothing, 28×28, grey, 10 classes.

    Args:
        train: Which of the two splits.
        root: Where the data is or will be downloaded to: a folder in torchvision's layout, or one that holds the
            four original `*-ubyte.gz` files themselves.
        padding: Pixels on each side of the training images from which crops are drawn; 0 for no crops.

    Raises:
        ValueError: `padding` is negative.
    """
    if padding < 0:
        raise ValueError(f"padding must be 0 or more, got {padding}")
    transform = transforms.fashion_mnist_transform(train, padding)
    prefix = "train" if train else "t10k"
    images_file = Path(root) / f"{prefix}-images-idx3-ubyte.gz"
    if images_file.is_file():
        labels = _read_idx(Path(root) / f"{prefix}-labels-idx1-ubyte.gz")
        return ImageData(ArrayImages(_read_idx(images_file), labels), transform, needs_workers=True)
    return ImageData(_downloaded("FashionMNIST", root, train), transform, needs_workers=True)


def cifar10(train: bool, root: str = "data") -> ImageData:
    """CIFAR-10: 50,000 and 10,000 images, 32×32, 10 classes; downloaded to `root` unless it is there."""
    transform = transforms.cifar_transform("cifar10", train)
    return ImageData(_downloaded("CIFAR10", root, train), transform, needs_workers=True)


def cifar100(train: bool, root: str = "data") -> ImageData:
    """CIFAR-100: 50,000 and 10,000 images, 32×32, 100 classes; downloaded to `root` unless it is there."""
    transform = transforms.cifar_transform("cifar100", train)
    return ImageData(_downloaded("CIFAR100", root, train), transform, needs_workers=True)


def imagenet(train: bool, root: str = "imagenet", image_size: int = 224) -> ImageData:
    """A tree of image files, `root/train/CLASS/*` and `root/val/CLASS/*`, such as ImageNet's.

    Args:
        train: `root/train` or `root/val`.
        root: The folder of the tree.
        image_size: Height and width of the crops.
    """
    from torchvision.datasets import ImageFolder

    images = ImageFolder(Path(root) / ("train" if train else "val"))
    return ImageData(images, transforms.imagenet_transform(train, image_size), needs_workers=True)


def synthetic(
    train: bool, num_samples: int = 1024, image_size: int = 224, num_channels: int = 3, num_classes: int = 1000
) -> ImageData:
    """Noise, for measuring throughput; the same for both splits."""
    del train
    images = SyntheticImages(num_samples, image_size, num_channels, num_classes)
    return ImageData(images, None, needs_workers=False)


DATASETS: dict[str, Callable[..., ImageData | StreamedImages]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet": imagenet,
    "streaming": streaming,
    "synthetic": synthetic,
}


def dataset_builder(name: str, path: str) -> Callable[..., ImageData | StreamedImages]:
    """The function behind a data set's name.

    Raises:
        UserError: Unknown name.
    """
    if name not in DATASETS:
        raise UserError(f"{path}: unknown data set {name!r}{did_you_mean(name, DATASETS)}")
    return DATASETS[name]


def _downloaded(cls: str, root: str, train: bool) -> Dataset:
    import torchvision.datasets

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
