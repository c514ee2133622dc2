"""Loads batches of images. A run that was killed and resumed sees the same images.

A random transform depends on (seed, epoch, index) alone: not on where a run was killed, nor on the number of data
workers or processes.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import VisionDataset

from composer_se.launch import available_cores

__all__ = ["EpochIndexSampler", "Images", "SeededImages", "Split", "StreamedImages"]


@dataclass(frozen=True)
class Images:
    """A split with random access to its images, which are in files or in memory.

    Attributes:
        images: A map-style data set of (image, label) without transforms.
        transform: Makes a tensor of an image. None: the images are tensors.
        needs_workers: True if reading images is so slow that worker processes help.
        classes: The names of the classes, or None if they are unknown.
    """

    images: Dataset
    transform: Callable[[Any], Any] | None
    needs_workers: bool
    classes: Sequence[str] | None

    def example(self) -> Tensor:
        """The first image."""
        return SeededImages(self.images, self.transform, seed=0)[0][0]

    def loader(self, batch_size: int, seed: int, train: bool, num_workers: int | None, pin_memory: bool) -> DataLoader:
        """Makes the loader of this process's share.

        Args:
            batch_size: The batch size of the whole run. Each process loads an equal part.
            seed: The seed of shuffling and augmentation, the same on all processes.
            train: True shuffles the images, augments them anew in each epoch, and drops an incomplete last batch.
            num_workers: Number of worker processes of each training process. None: 0, or one fewer than the process's
                cores (1 to 16) if ``needs_workers``.
            pin_memory: True for batches that go to a GPU.
        """
        if num_workers is None and not self.needs_workers:
            num_workers = 0
        images = SeededImages(self.images, self.transform, seed)
        if train:
            world_size, rank = dist.get_world_size(), dist.get_global_rank()
            sampler: Any = EpochIndexSampler(images, world_size, rank, shuffle=True, seed=seed, drop_last=True)
        else:
            sampler = dist.get_sampler(images, shuffle=False, drop_last=False)
        return DataLoader(images, sampler=sampler, **_options(batch_size, train, num_workers, pin_memory))


@dataclass(frozen=True)
class StreamedImages:
    """A split that is streamed with mosaicml-streaming.

    Attributes:
        options: The arguments of its `StreamingVisionDataset`, except those that `loader` sets.
        classes: Not known before the images are read.
    """

    options: dict[str, Any]
    classes: None = None

    def example(self) -> None:
        """None: no image has been fetched yet."""

    def loader(self, batch_size: int, seed: int, train: bool, num_workers: int | None, pin_memory: bool) -> DataLoader:
        """Makes the loader of this process's share, as `Images.loader` does."""
        from streaming import StreamingDataLoader  # type: ignore[import-not-found]
        from streaming.vision.base import StreamingVisionDataset  # type: ignore[import-not-found]

        class SeededStream(StreamingVisionDataset):
            """Seeds each image by (seed, epoch, index), as `SeededImages` does."""

            def __getitem__(self, at: Any) -> Any:
                if not isinstance(at, (int, np.integer)):
                    return super().__getitem__(at)
                with _random_state_kept():
                    _seed_all(self.shuffle_seed, max(0, self.next_epoch - 1), int(at))
                    return super().__getitem__(at)

        options = _options(batch_size, train, num_workers, pin_memory)
        images = SeededStream(shuffle=train, shuffle_seed=seed, batch_size=options["batch_size"], **self.options)
        return StreamingDataLoader(images, **options)


Split = Images | StreamedImages
"""One split of a data set, ready to be loaded."""


class SeededImages(VisionDataset):
    """A data set of (image, label) with a transform on the image.

    A `VisionDataset`, because Composer's RandAugment, AugMix and ColOut add themselves to the `transform` of one.

    Args:
        images: The images without transforms.
        transform: Called on each image.
        seed: Together with the epoch and the index, this seeds the random generators of torch, NumPy and Python
            before the transform of an image.
    """

    def __init__(self, images: Dataset, transform: Callable[[Any], Any] | None, seed: int) -> None:
        super().__init__(root="", transform=transform)
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(cast(Any, self.images))

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, Any]:
        """One image and its label, for an index or for an (epoch, index) of `EpochIndexSampler`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[tuple[Any, Any]]:
        """The images and labels of one batch."""
        with _random_state_kept():
            return [self._get(index) for index in indices]

    def _get(self, index: int | tuple[int, int]) -> tuple[Any, Any]:
        epoch, index = index if isinstance(index, tuple) else (0, index)
        _seed_all(self.seed, epoch, index)
        image, label = self.images[index]
        return (image if self.transform is None else self.transform(image)), label


class EpochIndexSampler(DistributedSampler):
    """A `DistributedSampler` that yields (epoch, index), so that data workers know the epoch."""

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        return ((self.epoch, index) for index in super().__iter__())


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _seed_all(*entropy: int) -> None:
    words = np.random.SeedSequence(entropy).generate_state(2)
    # Not torch.manual_seed: that one also queues a call for CUDA, with a stack trace, each time.
    torch.default_generator.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[0]))


def _options(batch_size: int, train: bool, num_workers: int | None, pin_memory: bool) -> dict[str, Any]:
    """The arguments of every loader. By default all cores of this process but one read images, at most 16."""
    if num_workers is None:
        num_workers = min(16, max(1, available_cores() - 1))
    return {
        "batch_size": batch_size // dist.get_world_size(),
        "num_workers": num_workers,
        "drop_last": train,
        "pin_memory": pin_memory,
        "persistent_workers": num_workers > 0,
    }
