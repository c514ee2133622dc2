"""Images with random transforms that are a function of (seed, epoch, index) and of nothing else.

So a run that was killed in the middle of an epoch sees the same images when it resumes, whatever the number of
data workers, and adding a worker or a process doesn't change what one image looks like.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler
from torchvision.datasets import VisionDataset

__all__ = ["EpochIndexSampler", "SeededImages", "seeded"]


class SeededImages(VisionDataset):
    """A data set of (image, label) with a transform on the image.

    A `VisionDataset`, because Composer's RandAugment, AugMix and ColOut add themselves to the `transform` of one.

    Args:
        images: The images without transforms.
        transform: Called on each image.
        seed: With the epoch and the index it seeds the random generators of torch, NumPy and Python for the
            transform of one image.
    """

    def __init__(self, images: Dataset, transform: Callable[[Any], Any] | None, seed: int) -> None:
        super().__init__(root="", transform=transform)
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(cast(Any, self.images))

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, Any]:
        """One image: plain for an index, reproducibly random for an (epoch, index) of `EpochIndexSampler`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[tuple[Any, Any]]:
        """The images of one batch."""
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
def seeded(*entropy: int) -> Iterator[None]:
    """Random generators seeded by integers inside, and untouched outside."""
    with _random_state_kept():
        _seed_all(*entropy)
        yield


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
