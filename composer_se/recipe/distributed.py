"""Sets up the processes of a run, and broadcasts values and buffers from rank zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from composer_se.errors import UserError
from composer_se.launch import threads_for
from composer_se.parts.data import image_size
from composer_se.recipe.schema import Recipe

__all__ = ["SameBuffers", "from_rank_zero", "join_processes"]

T = TypeVar("T")


def join_processes(recipe: Recipe) -> None:
    """Sets the number of threads, and initializes torch.distributed if there are several processes."""
    batch, size = recipe.train_batch_size // dist.get_world_size(), image_size(recipe.train_dataset)
    threads = threads_for(batch * size**2) if size else None  # None: one for each core of this process
    if threads is not None:
        torch.set_num_threads(threads)
    if dist.get_world_size() > 1:
        dist.initialize_dist(recipe.device, recipe.dist_timeout)


def from_rank_zero(read: Callable[[], T]) -> T:
    """Calls a function on rank zero alone and returns its value on all ranks.

    Raises:
        UserError: If `read` raises one on rank zero, on all ranks.
    """
    message: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            message[0] = read()
        except UserError as error:
            message[1] = str(error)
    dist.broadcast_object_list(message)
    if message[1]:
        raise UserError(message[1])
    return message[0]


class SameBuffers(Callback):
    """Broadcasts rank zero's buffers to all processes before an evaluation.

    After a training step the weights are equal on all processes, but each process has updated the running statistics
    of batch norm with its own images. Without the broadcast, each process would evaluate a slightly different network.
    The checkpoint holds rank zero's buffers.
    """

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Broadcasts the buffers."""
        if dist.get_world_size() > 1:
            for buffer in state.model.buffers():
                dist.broadcast(buffer, src=0)
