"""Builds the parts of a run, and Composer's Trainer from them: for `train`, `compare`, `gates` and `slim`."""

from __future__ import annotations

import atexit
import gc
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import composer
import torch
from composer.core import Algorithm, Engine, Event, State
from composer.core.passes import sort_to_back
from composer.loggers import Logger
from composer.models import ComposerClassifier
from composer.utils import dist, reproducibility
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from composer_se.errors import UserError, one_line
from composer_se.parts.arguments import argument_blamed, construct
from composer_se.parts.loaders import Split
from composer_se.recipe.schema import Recipe
from composer_se.recipe.validate import Component, DataPlan, RunPlan, log_once
from composer_se.trainable import train_only

__all__ = [
    "Parts",
    "build_algorithms",
    "build_loader",
    "build_parts",
    "count_outputs",
    "end_trainer",
    "make_trainer",
    "release_memory",
    "try_network",
]


@dataclass(frozen=True)
class Parts:
    """The parts of a Trainer, before any algorithm has changed the network.

    Attributes:
        network: The network. Its initial weights depend on the seed, but not on the algorithms.
        num_classes: The number of the network's outputs.
        algorithms: The recipe's algorithms, and one that freezes the parameters that the recipe does not train.
        optimizer: The optimizer of the network's parameters, or None if nothing is trained.
        scheduler: The scheduler of the learning rate, or None.
        train_loader: This process's share of the training data, or None if nothing is trained.
        eval_loader: This process's share of the held-out data, or None.
        classes: The names of the training data's classes, or None.
    """

    network: nn.Module
    num_classes: int
    algorithms: list[Algorithm]
    optimizer: Optimizer | None = None
    scheduler: Callable[..., float] | None = None
    train_loader: DataLoader | None = None
    eval_loader: DataLoader | None = None
    classes: Sequence[str] | None = None


def build_parts(recipe: Recipe, plan: RunPlan) -> Parts:
    """Seeds the random generators and builds the parts of a run.

    Raises:
        UserError: If a component rejects a value, the data can't be read, or network and data don't fit.
    """
    algorithms = build_algorithms(plan.algorithms)
    if recipe.trainable is not None:
        algorithms.append(_TrainOnly(recipe.trainable))
    scheduler = _build_scheduler(plan.scheduler) if plan.scheduler else None
    reproducibility.seed_all(recipe.seed)  # the same initial weights on every rank
    network = plan.model.build()
    optimizer = plan.optimizer.build(network.parameters())
    pin_memory = torch.cuda.is_available() and recipe.device in (None, "gpu")
    eval_loader = None
    with dist.run_local_rank_zero_first():  # so that one process of each node downloads
        split = plan.train_data.images.build(train=True)
        train_loader = build_loader(plan.train_data, split, recipe.train_batch_size, recipe.seed, True, pin_memory)
        splits = {"train_dataset": split}
        if plan.eval_data:
            split = splits["eval_dataset"] = plan.eval_data.images.build(train=False)
            eval_loader = build_loader(plan.eval_data, split, recipe.eval_batch_size, recipe.seed, False, pin_memory)
    if len(train_loader) == 0:
        raise UserError(
            f"train_batch_size: the training data has fewer than {recipe.train_batch_size} images; "
            "set a smaller train_batch_size"
        )
    outputs = count_outputs(network, plan.model, splits["train_dataset"])
    _check_classes(outputs, recipe.model["name"], splits)
    classes = splits["train_dataset"].classes
    return Parts(network, outputs, algorithms, optimizer, scheduler, train_loader, eval_loader, classes)


def build_loader(data: DataPlan, split: Split, batch_size: int, seed: int, train: bool, pin_memory: bool) -> DataLoader:
    """Builds the loader of a split.

    Raises:
        UserError: If the data set rejects a value.
    """
    return construct(split.loader, data.images.path, batch_size, seed, train, data.num_workers, pin_memory)


def build_algorithms(components: Sequence[Component]) -> list[Algorithm]:
    """Builds the algorithms of a recipe. Errors that they raise while a Trainer is made name their keys."""
    return [_build_algorithm(component) for component in components]


def count_outputs(network: nn.Module, model: Component, split: Split) -> int:
    """The number of the network's outputs for an image of the split.

    Raises:
        UserError: If the network rejects the image, or there is no image and the number of outputs is unknown.
    """
    name = getattr(model.target, "__name__", "the network")
    image = split.example()
    if image is not None:
        return try_network(network, image, name)
    parameter = inspect.signature(model.target).parameters.get("num_classes")
    said = model.arguments.get("num_classes", parameter and parameter.default)
    outputs = getattr(network, "num_classes", said)
    if not isinstance(outputs, int):
        raise UserError(f"model: {name} doesn't say how many classes it has; give it an attribute num_classes")
    return outputs


def try_network(network: nn.Module, image: Tensor, name: str) -> int:
    """Runs one image through the network in evaluation mode, and leaves the network as it was.

    Args:
        network: The network, on the image's device.
        image: An image as the training data yields it, (C, H, W).
        name: The network's name, for the message.

    Returns:
        The number of outputs.

    Raises:
        UserError: If the network fails on the image, or does not return one number per class.
    """
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            outputs = network.eval()(image[None])
    except (RuntimeError, ValueError, AssertionError) as error:
        channels, height, width = image.shape
        raise UserError(
            f"model: {name} does not take the images of train_dataset, of {channels} channels and {height}x{width} "
            f"pixels ({one_line(error)}); choose a model for such images, or set its input arguments"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UserError(f"model: {name} returns {got} for one image, expected a tensor of shape (1, classes)")
    return outputs.shape[1]


def make_trainer(parts: Parts, **options: Any) -> composer.Trainer:
    """Builds a Trainer from the parts of a run.

    Args:
        parts: The parts of the run.
        **options: The Trainer's other arguments.

    Raises:
        UserError: If an algorithm rejects the network, or the scheduler rejects the duration.
    """
    return composer.Trainer(
        model=ComposerClassifier(parts.network, num_classes=parts.num_classes),
        train_dataloader=parts.train_loader,
        optimizers=parts.optimizer,
        schedulers=parts.scheduler,
        algorithms=parts.algorithms,
        algorithm_passes=lambda algorithms, event: sort_to_back(algorithms, _TrainOnly),
        **options,
    )


def end_trainer(trainer: composer.Trainer) -> None:
    """Closes the Trainer, stops the data workers of its evaluations, and drops a reference to its state.

    Composer stops the workers of the training data only. Its `close` leaves a function registered with `atexit` that
    keeps the network, the optimizer and the last batch in memory until the process exits. `atexit` can't tell the
    functions of several Trainers apart, so all of them are dropped; the other Trainers close when they are collected.
    """
    trainer.close()
    for evaluator in trainer.state.evaluators:
        loader: Any = evaluator.dataloader.dataloader
        workers: Any = getattr(loader, "_iterator", None)
        if hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()
    atexit.unregister(Engine._close)


def release_memory() -> None:
    """Frees the memory of ended Trainers. They are in reference cycles, and a full GPU does not start the collector."""
    # Saving a checkpoint leaves the network in this cache of torch.
    getattr(getattr(state_dict, "_get_fqns", None), "cache_clear", lambda: None)()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _TrainOnly(Algorithm):
    """Freezes the parameters that no pattern matches, after all other algorithms have changed the network."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = patterns

    def match(self, event: Event, state: State) -> bool:
        return event is Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        try:
            train_only(state.model, self.patterns, state.optimizers)
        except ValueError as error:
            raise UserError(f"trainable: {one_line(error)}") from error


def _build_algorithm(component: Component) -> Algorithm:
    """Builds an algorithm. Errors that it raises while the Trainer is made name its key."""
    algorithm = component.build()
    apply = algorithm.apply

    def named_apply(event: Event, *args: Any) -> Any:
        try:
            return apply(event, *args)
        except (ValueError, TypeError) as error:
            if event is not Event.INIT:
                raise
            message = one_line(error)
            raise UserError(f"{component.path}{argument_blamed(message, component.arguments)}: {message}") from error

    algorithm.apply = named_apply
    return algorithm


def _build_scheduler(component: Component) -> Callable[..., float]:
    """Builds a scheduler. Errors that it raises about the duration name its key."""
    scheduler = component.build()

    def named_scheduler(state: State, ssr: float = 1.0) -> float:
        try:
            return scheduler(state, ssr)
        except ValueError as error:
            raise UserError(f"{component.path}: {one_line(error)}") from error

    return named_scheduler


def _check_classes(outputs: int, name: str, splits: dict[str, Split]) -> None:
    """Compares the classes of the data with the network's outputs and with each other.

    A label is an index into the list of classes. One folder too many would shift the labels without an error.
    """
    for path, split in splits.items():
        if split.classes is not None and outputs < len(split.classes):
            raise UserError(
                f"model.num_classes: {name} has {outputs} outputs, but {path} has {len(split.classes)} classes; "
                f"set model.num_classes={len(split.classes)}"
            )
    ours, *others = (split.classes for split in splits.values())
    if ours is not None and outputs > len(ours):
        unused = f"model.num_classes: {name} has {outputs} outputs for {len(ours)} classes; the others stay unused"
        log_once(logging.WARNING, unused)
    for theirs in others:
        if ours and theirs and {*ours} & {*theirs} and any(a != b for a, b in zip(ours, theirs, strict=False)):
            odd = ", ".join(map(repr, sorted({*ours} ^ {*theirs})[:5]))
            raise UserError(
                f"eval_dataset: its classes are not those of train_dataset ({odd} in one of them only), so their "
                "numbers differ"
            )
