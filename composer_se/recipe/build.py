"""Makes what a run trains out of its plan: network, data loaders, optimizer."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from composer_se.errors import UserError
from composer_se.recipe.messages import one_line

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    from composer_se.recipe.run_plan import DataPlan, RunPlan
    from composer_se.recipe.schema import Recipe

__all__ = ["Parts", "algorithm_named", "build_parts", "num_classes"]


@dataclass(frozen=True)
class Parts:
    """What a run trains, before any algorithm changed it.

    Attributes:
        network: With the same initial weights for a seed, whatever the algorithms.
        optimizer: Of the network's parameters.
        train_loader: This process's share of the training data.
        eval_loader: Its share of the held-out data, or None.
    """

    network: nn.Module
    optimizer: Optimizer
    train_loader: DataLoader
    eval_loader: DataLoader | None


def build_parts(recipe: Recipe, plan: RunPlan) -> Parts:
    """Seeds the random generators and builds.

    Raises:
        UserError: A component rejects a value, the data can't be read, or network and data don't fit.
    """
    from composer.utils import reproducibility

    from composer_se.recipe.augmentation import SeededImages
    from composer_se.recipe.fit import check_network_takes

    reproducibility.seed_all(recipe.seed)  # the same initial weights on every rank
    network = plan.model.build()
    optimizer = plan.optimizer.build(network.parameters())
    train_loader, eval_loader = _build_loaders(recipe, plan)
    if isinstance(train_loader.dataset, SeededImages):  # streamed images would have to be fetched first
        check_network_takes(network, train_loader.dataset[0][0], recipe.model["name"])
    return Parts(network, optimizer, train_loader, eval_loader)


def num_classes(network: nn.Module, plan: RunPlan) -> int | None:
    """The number of outputs: the recipe's word or its network's default; None if the network itself says it."""
    if hasattr(network, "num_classes"):
        return None  # ComposerClassifier asks the network
    default = inspect.signature(plan.model.target).parameters["num_classes"].default
    return plan.model.arguments.get("num_classes", default)


@contextlib.contextmanager
def algorithm_named(algorithms: Sequence[Any], plan: RunPlan) -> Iterator[None]:
    """Around the making of a Trainer, which applies the algorithms of a plan to its network.

    Raises:
        UserError: In the place of an algorithm's complaint about the network, with the algorithm's path.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for algorithm, component in zip(algorithms, plan.algorithms, strict=True):
                if frame.f_locals.get("self") is algorithm and frame.f_code.co_name == "apply":
                    raise UserError(f"{component.path}: {one_line(error)}") from error
        raise


def _build_loaders(recipe: Recipe, plan: RunPlan) -> tuple[DataLoader, DataLoader | None]:
    import torch
    from composer.utils import dist

    from composer_se.recipe.arguments import construct
    from composer_se.recipe.dataloaders import build_dataloader

    def build(data: DataPlan, batch_size: int, train: bool) -> Any:
        images = data.images.build(train=train)
        options = (batch_size, recipe.seed, train, data.num_workers, pin_memory)
        return construct(build_dataloader, data.images.path, images, *options)

    pin_memory = torch.cuda.is_available() and recipe.device in (None, "gpu")
    with dist.run_local_rank_zero_first():  # so that one process of each node downloads
        train_loader = build(plan.train_data, recipe.train_batch_size, train=True)
        eval_loader = build(plan.eval_data, recipe.eval_batch_size, train=False) if plan.eval_data else None
    if len(train_loader) == 0:
        raise UserError(
            f"train_batch_size: the training data has fewer than {recipe.train_batch_size} images; "
            "set a smaller train_batch_size"
        )
    return train_loader, eval_loader
