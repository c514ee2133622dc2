"""Data loaders: this process's share of the global batch, sampled and augmented reproducibly."""

from __future__ import annotations

from typing import Any

from composer.utils import dist
from torch.utils.data import DataLoader

from composer_se.recipe.augmentation import EpochIndexSampler, SeededImages
from composer_se.recipe.datasets import ImageData
from composer_se.recipe.ranks import available_cores
from composer_se.recipe.streaming_data import StreamedImages

__all__ = ["build_dataloader", "default_workers"]


def build_dataloader(
    data: ImageData | StreamedImages, batch_size: int, seed: int, train: bool, num_workers: int | None, pin_memory: bool
) -> DataLoader:
    """Builds the loader of one split.

    Args:
        data: The split.
        batch_size: Of the whole run; each process gets its equal part.
        seed: Of shuffling and augmentation. The same on all processes.
        train: Shuffle, augment by epoch, and drop the samples that fill no batch.
        num_workers: Worker processes per training process. None: `default_workers`.
        pin_memory: Whether batches go to a GPU.
    """
    if num_workers is None:
        num_workers = default_workers(data)
    if isinstance(data, StreamedImages):
        return data.build(batch_size // dist.get_world_size(), seed, num_workers, pin_memory)
    images = SeededImages(data.images, data.transform, seed)
    if train:
        world_size, rank = dist.get_world_size(), dist.get_global_rank()
        sampler: Any = EpochIndexSampler(images, world_size, rank, shuffle=True, seed=seed, drop_last=True)
    else:
        sampler = dist.get_sampler(images, shuffle=False, drop_last=False)
    return DataLoader(
        images,
        batch_size=batch_size // dist.get_world_size(),
        sampler=sampler,
        num_workers=num_workers,
        drop_last=train,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def default_workers(data: ImageData | StreamedImages) -> int:
    """None for data in memory, else the cores of this process but one for training itself, at most 16."""
    if isinstance(data, ImageData) and not data.needs_workers:
        return 0
    return min(16, max(1, available_cores() - 1))
