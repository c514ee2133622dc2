"""The images of the data sets that a recipe can name: how each is read, divided and made into tensors."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torchvision.datasets
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision import transforms as v1
from torchvision.transforms import v2

from composer_se.errors import one_line
from composer_se.parts.image_tree import ImageTree, split_folder, split_indices
from composer_se.parts.loaders import Images, StreamedImages

__all__ = ["cifar10", "cifar100", "digits", "fashion_mnist", "image_folder", "imagenet", "streaming", "synthetic"]


def digits(train: bool) -> Images:
    """The 1797 handwritten digits of scikit-learn, 8×8, grey, 10 classes.

    A fixed fifth (360 images), stratified by class, is held out: every run is measured on the same images. Small random
    rotations, shifts and scalings augment the training images. Flips don't: a flipped digit is none.
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


def fashion_mnist(
    train: bool,
    root: str = "data",
    padding: int = 4,
    image_size: int = 28,
    num_channels: Literal[1, 3] = 1,
    num_samples: int | None = None,
) -> Images:
    """Fashion-MNIST: 60,000 and 10,000 images of clothing, 28×28, grey, 10 classes.

    Args:
        train: True for the training images, False for the held-out ones.
        root: The folder of the data. They are downloaded there if it does not hold them.
        padding: Pixels that are added on each side of a training image before a random crop; 0 for no crops.
        image_size: Height and width in pixels that the images are resized to, after the crop.
        num_channels: 1, or 3 for pretrained networks that take colour images: the grey channel is repeated, and a pixel
            x from 0 to 255 becomes (x - 127) / 128.
        num_samples: The number of training images, always the same random ones. None: all.

    Raises:
        ValueError: If an argument is out of range, ``num_samples`` is given for the held-out images, or the download
            fails.
    """
    if padding < 0:
        raise ValueError(f"padding must be 0 or more, got {padding}")
    steps = _pad_crop_flip(28, padding) if train else []
    if image_size != 28:  # after the crop, which is cheaper on fewer pixels
        steps.append(v2.Resize(_checked_size(image_size), antialias=True))
    mean, std = (0.2860, 0.3530) if num_channels == 1 else (127 / 255, 128 / 255)
    transform = _to_tensor(steps, (mean,), (std,))
    if num_channels == 3:
        transform.transforms.append(v2.Grayscale(3))
    prefix = Path(root) / ("train" if train else "t10k")
    if Path(f"{prefix}-images-idx3-ubyte.gz").is_file():
        files = (Path(f"{prefix}-{content}-ubyte.gz") for content in ("images-idx3", "labels-idx1"))
        images: Any = _ArrayImages(*map(_read_idx, files))
    else:
        images = _downloaded("FashionMNIST", root, train)
    if num_samples is not None:
        if not train:
            raise ValueError("num_samples is for training images; eval_subset_num_batches evaluates on fewer")
        if not 0 < num_samples <= len(images):
            raise ValueError(f"num_samples must be 1 to {len(images)}, got {num_samples}")
        images = Subset(images, np.random.RandomState(0).permutation(len(images))[:num_samples].tolist())
    return Images(images, transform, True, torchvision.datasets.FashionMNIST.classes)


def cifar10(train: bool, root: str = "data") -> Images:
    """CIFAR-10: 50,000 and 10,000 images, 32×32, 10 classes.

    Args:
        train: True for the training images, False for the held-out ones.
        root: The folder of the data. They are downloaded there if it does not hold them.

    Raises:
        ValueError: If the download fails.
    """
    return _cifar("CIFAR10", train, root, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(train: bool, root: str = "data") -> Images:
    """CIFAR-100: 50,000 and 10,000 images, 32×32, 100 classes.

    Args:
        train: True for the training images, False for the held-out ones.
        root: The folder of the data. They are downloaded there if it does not hold them.

    Raises:
        ValueError: If the download fails.
    """
    return _cifar("CIFAR100", train, root, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def image_folder(
    train: bool, root: str, image_size: int = 224, val_fraction: float = 0.2, split_seed: int = 0
) -> Images:
    """Your own image files: one folder of images per class.

    Each folder is a class; the classes are numbered in the order of the folders' names. Training uses random resized
    crops and flips, evaluation the central crop of 7/8. Without folders `train` and `val`, a part of every class is
    held out, always the same images as long as no file is added, renamed or removed.

    Args:
        train: True for the images to train on, False for the held-out ones.
        root: The folder that holds the folders of the classes, or `train` and `val`.
        image_size: Height and width of the crops in pixels.
        val_fraction: Share of the images to hold out, in (0, 1). It has no effect if `root` holds `train` or `val`.
        split_seed: Seed of the random choice of the held-out images.

    Raises:
        ValueError: If an argument is out of range, or a split would have no image.
    """
    transform = _imagenet_transform(train, image_size)
    folder, is_whole = split_folder(Path(root), train)
    tree = ImageTree(folder)
    chosen = split_indices(tree.targets, train, val_fraction, split_seed) if is_whole else range(len(tree))
    return Images(Subset(tree, chosen), transform, True, tree.classes)


def imagenet(train: bool, root: str = "imagenet", image_size: int = 224) -> Images:
    """ImageNet: the same as `image_folder`, for folders `train` and `val`.

    Args:
        train: True for the images in `root/train`, False for those in `root/val`.
        root: The folder that holds `train` and `val`.
        image_size: Height and width of the crops in pixels.

    Raises:
        ValueError: If ``image_size`` is below 1.
    """
    return image_folder(train, root, image_size)


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
    """Images that mosaicml-streaming fetches from object storage, with the transforms of `imagenet`.

    Args:
        train: True for the random crops and flips of training, False for the central crop.
        remote: Place of the shards, such as `s3://bucket/folder`. None: all of them are in `local`.
        local: Folder in which each node keeps the shards that it fetched. None: mosaicml-streaming's choice.
        split: Subfolder of `remote` and of `local` that holds the shards. None: they hold the shards themselves.
        image_size: Height and width of the crops in pixels.
        cache_limit: The most that `local` may hold, such as `100gb`. None: no limit.
        predownload: Number of images that a worker fetches ahead. None: mosaicml-streaming's choice.
        num_canonical_nodes: Number of nodes that fixes the order of the images, to resume on another number of nodes.
            None: the nodes of this run.
        shuffle_block_size: Number of images that are shuffled together.

    Raises:
        ValueError: If neither `remote` nor `local` is given, or ``image_size`` is below 1.
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
        train: Has no effect.
        num_samples: Number of images.
        image_size: Height and width of the images in pixels.
        num_channels: Channels of an image.
        num_classes: Number of classes.

    Raises:
        ValueError: If a number is below 1.
    """
    del train
    if min(num_samples, image_size, num_channels, num_classes) < 1:
        raise ValueError("num_samples, image_size, num_channels and num_classes must be 1 or more")
    images = _SyntheticImages(num_samples, image_size, num_channels, num_classes)
    return Images(images, None, False, [str(label) for label in range(min(num_samples, num_classes))])


class _ArrayImages(Dataset):
    """Grey images of shape (N, H, W), uint8, in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


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
    """Training takes padded crops and flips (He et al., https://arxiv.org/abs/1512.03385, section 4.2)."""
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
    """Reads an array of unsigned bytes from a gzipped file in MNIST's IDX format."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=dimensions, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _imagenet_transform(train: bool, image_size: int) -> Callable[[Any], Any]:
    steps: list[v2.Transform]
    if train:
        steps = [v2.RandomResizedCrop(_checked_size(image_size), antialias=True), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(_checked_size(image_size) * 256 // 224, antialias=True), v2.CenterCrop(image_size)]
    return _to_tensor(steps, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _checked_size(image_size: int) -> int:
    if image_size < 1:
        raise ValueError(f"image_size must be 1 or more, got {image_size}")
    return image_size


def _pad_crop_flip(size: int, padding: int) -> list[v2.Transform]:
    crop = [v2.RandomCrop(size, padding=padding)] if padding else []
    return [*crop, v2.RandomHorizontalFlip()]


def _to_tensor(steps: Sequence[v2.Transform], mean: tuple[float, ...], std: tuple[float, ...]) -> v1.Compose:
    # The steps are torchvision's v2 transforms. They stand in a v1 `Compose` around a v1 `ToTensor` because that is
    # where Composer's RandAugment, AugMix and ColOut look for the place to insert themselves.
    return v1.Compose([*steps, v1.ToTensor(), v2.Normalize(mean, std)])
