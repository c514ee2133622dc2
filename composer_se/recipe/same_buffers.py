"""Evaluates the same network on all processes."""

from __future__ import annotations

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

__all__ = ["SameBuffers"]


class SameBuffers(Callback):
    """Gives all processes rank zero's buffers before an evaluation.

    Distributed training keeps weights equal, but each process updates the running statistics of batch norm with its
    own images until the next training step. Without this, the processes would measure slightly different networks,
    and none but rank zero the one that the checkpoint holds.
    """

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Broadcasts the buffers."""
        if dist.get_world_size() > 1:
            for buffer in state.model.buffers():
                dist.broadcast(buffer, src=0)
