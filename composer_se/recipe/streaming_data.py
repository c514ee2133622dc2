"""Images streamed from object storage with mosaicml-streaming, an extra that is imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from composer_se.recipe.augmentation import seeded
from composer_se.recipe.transforms import imagenet_transform

__all__ = ["StreamedImages", "streaming"]


@dataclass(frozen=True)
class StreamedImages:
    """One split of a streamed data set, without the batch size that its order depends on.

    Attributes:
        build: Makes the loader, given the batch size per process, the seed, the number of workers, and whether
            to pin memory.
    """

    build: Callable[[int, int, int, bool], DataLoader]


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
    """Shards in MDS format with the columns `x` (an image) and `y` (its class).

    Args:
        train: Whether to shuffle and augment.
        remote: Where the shards are, such as `s3://bucket/folder`. None: all of them are in `local`.
        local: Where each node keeps the shards it fetched.
        split: Subfolder of both.
        image_size: Height and width of the crops.
        cache_limit: The most that `local` may hold, such as `100gb`. None: no limit.
        predownload: Images to fetch ahead per worker. None: mosaicml-streaming's choice.
        num_canonical_nodes: Fixes the order of images for resuming on another number of nodes.
        shuffle_block_size: Images that are shuffled together.

    Raises:
        ImportError: mosaicml-streaming is not installed.
        ValueError: Neither `remote` nor `local` is given.
    """
    from streaming import StreamingDataLoader  # type: ignore[import-not-found]
    from streaming.vision.base import StreamingVisionDataset  # type: ignore[import-not-found]

    if remote is None and local is None:
        raise ValueError("set remote (where the shards are), or local (when all of them are here)")

    class SeededStream(StreamingVisionDataset):
        """Seeds each image by (seed, epoch, index), as `SeededImages` does."""

        def __getitem__(self, at: Any) -> Any:
            if not isinstance(at, (int, np.integer)):
                return super().__getitem__(at)
            with seeded(self.shuffle_seed, max(0, self.next_epoch - 1), int(at)):
                return super().__getitem__(at)

    def build(batch_size: int, seed: int, num_workers: int, pin_memory: bool) -> DataLoader:
        images = SeededStream(
            remote=remote,
            local=local,
            split=split,
            cache_limit=cache_limit,  # type: ignore[arg-type]
            predownload=predownload,
            num_canonical_nodes=num_canonical_nodes,
            shuffle=train,
            shuffle_seed=seed,
            shuffle_block_size=shuffle_block_size,
            batch_size=batch_size,
            transform=imagenet_transform(train, image_size),
        )
        return StreamingDataLoader(
            images,
            batch_size=batch_size,
            num_workers=num_workers,
            drop_last=train,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
        )

    return StreamedImages(build)
