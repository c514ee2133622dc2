"""Checks a recipe beyond its schema, and returns a plan: each class to call, with its arguments.

Nothing is built here: no weights, no data, no file.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from composer.core import Precision, Time, TimeUnit
from composer.loggers import TensorboardLogger

from composer_se.algorithm import SqueezeExcite
from composer_se.errors import UserError, did_you_mean
from composer_se.options import SqueezeExciteOptions
from composer_se.parts.arguments import check_arguments, construct
from composer_se.parts.components import resolve
from composer_se.parts.data import DataSet, find_dataset
from composer_se.parts.models import check_network, with_num_classes
from composer_se.recipe.schema import Recipe

__all__ = [
    "Component",
    "RunPlan",
    "advise_identity",
    "count_classes",
    "log_once",
    "make_plan",
    "plan_data",
    "plan_model",
    "plan_network",
    "plan_section",
    "squeeze_excite_options",
]


@dataclass(frozen=True)
class Component:
    """A class or function of a recipe, with its checked arguments.

    Attributes:
        path: The key of the component in the recipe.
        target: The class or function.
        arguments: The checked arguments for a call of the target.
    """

    path: str
    target: Callable[..., Any]
    arguments: dict[str, Any]

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the target. If the target rejects a value, raises a `UserError` that names the path."""
        return construct(self.target, self.path, *args, **kwargs, **self.arguments)


@dataclass(frozen=True)
class DataPlan:
    """A data set and how it is loaded."""

    images: Component
    num_workers: int | None


@dataclass(frozen=True)
class RunPlan:
    """All components of a run."""

    model: Component
    train_data: DataPlan
    eval_data: DataPlan | None
    optimizer: Component
    scheduler: Component | None
    algorithms: list[Component] = field(default_factory=list)
    callbacks: list[Component] = field(default_factory=list)
    loggers: list[Component] = field(default_factory=list)


def make_plan(recipe: Recipe) -> RunPlan:
    """Checks a recipe and returns its components.

    Raises:
        UserError: If a value is wrong. The message names the key by its full path.
    """
    _check_batch_sizes(recipe)
    _check_machine(recipe)
    _check_durations(recipe)
    _check_numbers(recipe)
    plan = RunPlan(
        model=plan_network(recipe),
        train_data=plan_data("train_dataset", recipe.train_dataset),
        eval_data=plan_data("eval_dataset", recipe.eval_dataset) if recipe.eval_dataset else None,
        optimizer=_plan_named("optimizer", recipe.optimizer, supplied=1),
        scheduler=_plan_named("scheduler", recipe.scheduler) if recipe.scheduler else None,
        algorithms=plan_section("algorithms", recipe.algorithms),
        callbacks=plan_section("callbacks", recipe.callbacks),
        loggers=plan_section("loggers", recipe.loggers),
    )
    _check_same_split(recipe)
    _check_warmup(recipe, plan.scheduler)
    for logger in plan.loggers:
        if logger.target is TensorboardLogger:  # by default it writes into the current folder
            logger.arguments.setdefault("log_dir", f"{recipe.run_folder}/tensorboard")
    path = recipe.load_path
    if path and "://" not in path and not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a long name
        raise UserError(f"load_path: the file {path!r} does not exist")
    return plan


def plan_network(recipe: Recipe) -> Component:
    """The network of a recipe. `num_classes` defaults to the number of classes in the training data.

    Raises:
        UserError: If a value is wrong. The message names the key by its full path.
    """
    return plan_model(with_num_classes(recipe.model, count_classes(recipe)))


def plan_model(section: dict[str, Any]) -> Component:
    """The network of a recipe's section `model`.

    Raises:
        UserError: If the model can't be found, or one of its arguments is wrong.
    """
    return Component("model", *check_network(section["name"], _without(section, "name")))


def count_classes(recipe: Recipe) -> int | None:
    """The number of classes of the training data, or None if it is unknown before the data is read.

    Raises:
        UserError: If the data set or its arguments are wrong.
    """
    dataset, arguments = _check_dataset("train_dataset", recipe.train_dataset)
    return dataset.count_classes(arguments)


def _check_dataset(path: str, section: dict[str, Any]) -> tuple[DataSet, dict[str, Any]]:
    """The data set of a section with its checked arguments."""
    dataset = find_dataset(section["name"], f"{path}.name")
    given = _without(section, "name", "num_workers")
    return dataset, check_arguments(dataset.open, given, path, supplied=("train",))


def plan_data(path: str, section: dict[str, Any]) -> DataPlan:
    """Checks the section `path`: `train_dataset` or `eval_dataset`.

    Raises:
        UserError: If there is no such data set, one of its arguments is wrong, or files are missing.
    """
    dataset, arguments = _check_dataset(path, section)
    num_workers = check_arguments(_loader_arguments, {"num_workers": section.get("num_workers")}, path)["num_workers"]
    if num_workers is not None and num_workers < 0:
        raise UserError(f"{path}.num_workers: expected 0 or more, got {num_workers}")
    fault = dataset.find_fault(path == "train_dataset", arguments)
    if fault:
        raise UserError(f"{path}.{fault[0]}: {fault[1]}")
    return DataPlan(Component(path, dataset.open, arguments), num_workers)


def _check_same_split(recipe: Recipe) -> None:
    """Refuses splits of one data set that are divided differently, since both could have the same images."""
    ours, theirs = recipe.train_dataset, recipe.eval_dataset or {}
    places = {os.path.realpath(str(section.get("root"))) for section in (ours, theirs)}
    if ours["name"] != theirs.get("name") or len(places) > 1:
        return
    dataset = find_dataset(ours["name"], "train_dataset.name")
    for name in dataset.shared:
        default = inspect.signature(dataset.open).parameters[name].default
        here, there = (section.get(name, default) for section in (ours, theirs))
        if here != there:
            raise UserError(
                f"eval_dataset.{name}: is {there!r}, but {here!r} in train_dataset; set both alike, or images would "
                "be in both of them"
            )


def _loader_arguments(num_workers: int | None = None) -> None:
    """Gives the signature of the argument that every data set takes besides its own."""


def _plan_named(section: str, content: dict[str, Any], supplied: int = 0) -> Component:
    """The component of a section such as `optimizer`. The recipe can't set the first `supplied` arguments."""
    target = resolve(section, content["name"], f"{section}.name")
    first = tuple(inspect.signature(target).parameters)[:supplied]
    return Component(section, target, check_arguments(target, _without(content, "name"), section, first))


def plan_section(section: str, content: dict[str, Any] | None) -> list[Component]:
    """The components of a recipe's section `algorithms`, `callbacks` or `loggers`.

    Raises:
        UserError: If a component can't be found, or one of its arguments is wrong.
    """
    planned = []
    for name, arguments in (content or {}).items():
        path = f"{section}.{name}"
        target = resolve(section, name, path)
        if arguments is not None:  # null removes a component, but its name is still checked
            planned.append(Component(path, target, check_arguments(target, arguments, path)))
    return planned


def _without(section: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def _check_batch_sizes(recipe: Recipe) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    for key in ("train_batch_size", "eval_batch_size"):
        batch_size = getattr(recipe, key)
        if batch_size < 1:
            raise UserError(f"{key}: expected 1 or more, got {batch_size}")
        if batch_size % world_size:
            nearest = max(world_size, round(batch_size / world_size) * world_size)
            raise UserError(
                f"{key}: the global batch of {batch_size} can't be divided among {world_size} processes; "
                f"set {key}={nearest}, say"
            )


def _check_machine(recipe: Recipe) -> None:
    devices = ("cpu", "gpu", "mps", "tpu")
    if recipe.device not in (None, *devices):
        raise UserError(f"device: unknown device {recipe.device!r}{did_you_mean(str(recipe.device), devices)}")
    has_gpu = torch.cuda.is_available()
    if recipe.device == "gpu" and not has_gpu:
        raise UserError("device: gpu, but torch sees no CUDA device here; leave device out or set device=cpu")
    on_gpu = has_gpu and recipe.device in (None, "gpu")

    size = recipe.device_train_microbatch_size
    if isinstance(size, str) and size != "auto":
        raise UserError(f"device_train_microbatch_size: expected a whole number or auto, got {size!r}")
    if size == "auto" and not on_gpu:
        raise UserError("device_train_microbatch_size: auto needs a GPU; set a number, or null for no splitting")
    if isinstance(size, int | float) and size <= 0:
        raise UserError(f"device_train_microbatch_size: expected more than 0, got {size}")

    precisions = [precision.value for precision in Precision]
    if recipe.precision not in (None, *precisions):
        raise UserError(
            f"precision: unknown precision {recipe.precision!r}{did_you_mean(str(recipe.precision), precisions)}"
        )
    on_cpu = recipe.device == "cpu" or (recipe.device is None and not has_gpu)
    if recipe.precision not in (None, "fp32") and on_cpu:
        raise UserError(f"precision: Composer trains in fp32 on a CPU, not in {recipe.precision}; set precision=fp32")


def _check_durations(recipe: Recipe) -> None:
    for key in ("max_duration", "eval_interval", "save_interval", "console_log_interval"):
        value = getattr(recipe, key)
        try:
            time = Time.from_input(value, TimeUnit.EPOCH)
        except (ValueError, RuntimeError, TypeError, OverflowError) as error:
            raise UserError(f"{key}: expected a duration such as 90ep or 1000ba, got {value!r}") from error
        if key == "max_duration" and time.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE):
            raise UserError(f"{key}: expected epochs, batches or samples (90ep, 1000ba, 100000sp), got {value!r}")
        if time.value <= 0 and key != "eval_interval":
            raise UserError(f"{key}: expected more than 0, got {value!r}")


def _check_numbers(recipe: Recipe) -> None:
    if not 0 <= recipe.seed < 2**32:
        raise UserError(f"seed: expected 0 to {2**32 - 1}, got {recipe.seed}")
    for key in ("scale_schedule_ratio", "dist_timeout"):
        value = getattr(recipe, key)
        if value <= 0:
            raise UserError(f"{key}: expected a number above 0, got {value}")
    for key in ("train_subset_num_batches", "eval_subset_num_batches"):
        value = getattr(recipe, key)
        if value < 1 and value != -1:
            raise UserError(f"{key}: expected 1 or more, or -1 for all, got {value}")
    if recipe.scale_schedule_ratio != 1 and recipe.scheduler is None:
        raise UserError("scale_schedule_ratio: there is no scheduler to scale; add one, or change max_duration instead")


def _check_warmup(recipe: Recipe, scheduler: Component | None) -> None:
    """Refuses a warm-up in samples beside a schedule in other units, or the reverse: Composer can't compare them."""
    if scheduler is None or "t_warmup" not in scheduler.arguments:
        return
    warmup, end = scheduler.arguments["t_warmup"], scheduler.arguments.get("t_max", "1dur")
    try:
        begins, ends, lasts = (
            Time.from_input(time, TimeUnit.EPOCH).unit for time in (warmup, end, recipe.max_duration)
        )
    except (ValueError, RuntimeError, TypeError, OverflowError):
        return  # the scheduler itself rejects the value
    ends = lasts if ends is TimeUnit.DURATION else ends
    if begins is not TimeUnit.DURATION and (begins is TimeUnit.SAMPLE) != (ends is TimeUnit.SAMPLE):
        raise UserError(
            f"scheduler.t_warmup: {warmup!r} can't be compared with max_duration={recipe.max_duration}; give it "
            "in the same unit, or as a share of the whole (0.1dur)"
        )


def advise_identity(plan: RunPlan, loaded: Iterable[str] | None) -> None:
    """Advises init=identity in the log if a pretrained network gets blocks that start at random.

    Args:
        plan: The plan of the run.
        loaded: The names of the weights in the file of `load_path`, or None.
    """
    pretrained = any(plan.model.arguments.get(key) for key in ("weights", "pretrained"))
    pretrained = pretrained or (loaded is not None and not any(".se.pool_and_mlp." in name for name in loaded))
    blocks = next((part.arguments for part in plan.algorithms if part.target is SqueezeExcite), {"init": None})
    if pretrained and blocks.get("init", SqueezeExciteOptions.init) == "default":
        log_once(
            logging.INFO,
            "algorithms.squeeze_excite.init: blocks that start at random undo pretrained weights; init=identity leaves "
            "the network as it is",
        )


@functools.cache
def log_once(level: int, message: str) -> None:
    """Logs a message once per process. `compare` plans and builds a run several times."""
    logging.getLogger(__name__).log(level, message)


def squeeze_excite_options(recipe: Recipe) -> SqueezeExciteOptions | None:
    """The options under `algorithms.squeeze_excite` of a recipe, or None where the recipe has none.

    Raises:
        UserError: If an option is unknown or has a wrong value.
    """
    section = (recipe.algorithms or {}).get("squeeze_excite")
    if section is None:
        return None
    return SqueezeExciteOptions(**check_arguments(SqueezeExcite, section, "algorithms.squeeze_excite"))
