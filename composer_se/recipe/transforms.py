"""The standard transforms of each data set, from PIL images to normalised tensors.

The steps are torchvision's v2 transforms. They stand in a v1 `Compose` around a v1 `ToTensor` because that is
where Composer's RandAugment, AugMix and ColOut look for the place to insert themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchvision import transforms as v1
from torchvision.transforms import v2

__all__ = ["cifar_transform", "digits_transform", "fashion_mnist_transform", "imagenet_transform"]

_CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def digits_transform(train: bool) -> Callable[[Any], Any]:
    """Small rotations, shifts and scalings; no flips, which would turn a digit into none."""
    steps = [
        v2.RandomAffine([-10, 10], translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
    ]
    return _to_tensor(steps if train else [], (0.3053,), (0.3760,))


def fashion_mnist_transform(train: bool, padding: int) -> Callable[[Any], Any]:
    """Crops of the padded image, and flips: those of CIFAR, at 28×28."""
    return _to_tensor(_pad_crop_flip(28, padding) if train else [], (0.2860,), (0.3530,))


def cifar_transform(name: str, train: bool) -> Callable[[Any], Any]:
    """Crops of the image padded by 4, and flips (He et al., https://arxiv.org/abs/1512.03385, section 4.2)."""
    return _to_tensor(_pad_crop_flip(32) if train else [], *_CIFAR_STATISTICS[name])


def imagenet_transform(train: bool, image_size: int) -> Callable[[Any], Any]:
    """Random resized crops and flips for training; the central crop of 7/8 for evaluation."""
    steps: list[v2.Transform]
    if train:
        steps = [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(image_size * 256 // 224, antialias=True), v2.CenterCrop(image_size)]
    return _to_tensor(steps, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _pad_crop_flip(size: int, padding: int = 4) -> list[v2.Transform]:
    crop = [v2.RandomCrop(size, padding=padding)] if padding else []
    return [*crop, v2.RandomHorizontalFlip()]


def _to_tensor(steps: Sequence[v2.Transform], mean: tuple[float, ...], std: tuple[float, ...]) -> v1.Compose:
    return v1.Compose([*steps, v1.ToTensor(), v2.Normalize(mean, std)])
