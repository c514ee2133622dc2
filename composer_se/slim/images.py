"""Splits the held-out images into two halves: one decides which blocks are fixed, the other only reports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from composer_se.errors import UserError

__all__ = ["halves"]

_SEED = 0
_MOST_BYTES = 2**31  # a larger half is read again for every pass, not kept in memory


def halves(loader: DataLoader) -> list[tuple[Iterable[Any], int]]:
    """Splits the images of a loader at random, always in the same way.

    Args:
        loader: The loader of a map-style data set of (image, label).

    Returns:
        The batches of the deciding and of the reporting half, in the loader's order, each with its number of images.

    Raises:
        UserError: If there are fewer than two images.
    """
    images: Any = loader.dataset
    if len(images) < 2:
        raise UserError(f"--data: expected two held-out images at least, to decide and to report, got {len(images)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SEED)).tolist()
    middle = len(order) // 2
    return [(_batches(loader, sorted(part)), len(part)) for part in (order[:middle], order[middle:])]


def _batches(loader: DataLoader, indices: list[int]) -> Iterable[Any]:
    images: Any = loader.dataset
    half = DataLoader(Subset(images, indices), loader.batch_size, num_workers=loader.num_workers)
    if images[0][0].nbytes * len(indices) > _MOST_BYTES:
        return half
    # Clones, because a tensor from a worker lies in shared memory, which keeps a file open.
    return [(images.clone(), labels.clone()) for images, labels in half]
