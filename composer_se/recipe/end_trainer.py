"""Ends a Trainer so that the next one in the same process has its memory and its cores."""

from __future__ import annotations

import atexit
import gc
from typing import TYPE_CHECKING, Any

import torch
from composer.core import Engine
from torch.distributed.checkpoint import state_dict

if TYPE_CHECKING:
    from composer import Trainer

__all__ = ["end_trainer", "release_memory"]


def end_trainer(trainer: Trainer) -> None:
    """Closes the Trainer, stops the data workers of its evaluations, and lets it be collected.

    Composer stops the workers of the training data only, and keeps every Trainer's state, the network, the optimizer
    and the last batch with it, until the process exits: `close` leaves the function registered that would close it
    then. The functions of other Trainers are dropped with it, as `atexit` can't tell them apart; those Trainers close
    when they are collected.
    """
    trainer.close()
    for evaluator in trainer.state.evaluators:
        loader: Any = evaluator.dataloader.dataloader
        workers: Any = getattr(loader, "_iterator", None)
        if hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()
    atexit.unregister(Engine._close)


def release_memory() -> None:
    """Collects what ended Trainers leave behind: reference cycles, which a GPU's memory does not hurry."""
    # Saving a checkpoint leaves the network in this cache of torch.
    getattr(getattr(state_dict, "_get_fqns", None), "cache_clear", lambda: None)()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
