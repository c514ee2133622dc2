"""Loads a trained network from a run's folder or a checkpoint, and held-out images to run it on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.core import Algorithm
from torch import nn
from torch.utils.data import DataLoader

from composer_se.errors import UserError, one_line
from composer_se.gates.observe import se_blocks
from composer_se.parts.data import DATASETS
from composer_se.parts.loaders import Split
from composer_se.parts.models import with_num_classes, without_weights
from composer_se.parts.weights import LoadedWeights, read_plain_weights
from composer_se.recipe.checkpoints import LATEST, WEIGHTS, check_whole
from composer_se.recipe.load import load_recipe
from composer_se.recipe.run_folder import read_classes
from composer_se.recipe.schema import Recipe
from composer_se.recipe.trainer import Parts, build_algorithms, build_loader, count_outputs, end_trainer, make_trainer
from composer_se.recipe.validate import Component, count_classes, plan_data, plan_model, plan_section

__all__ = ["Trained", "load_trained"]


@dataclass(frozen=True)
class Trained:
    """A trained network and held-out images.

    Attributes:
        name: The name of the run or the checkpoint.
        network: The network, in evaluation mode, on its device.
        batches: Yields (images, labels).
        data: Name of the data set.
        classes: Names of the classes, or None if they are unknown.
        checkpoint: The file of the weights.
        run_folder: The run's folder, or None for a checkpoint outside of one.
        recipe: The recipe of the run.
    """

    name: str
    network: nn.Module
    batches: DataLoader
    data: str
    classes: Sequence[str] | None
    checkpoint: Path
    run_folder: Path | None
    recipe: Recipe


def load_trained(source: Path, recipe_name: str | None, data: str | None, device: torch.device) -> Trained:
    """Loads a run's last checkpoint, or a given one, into the network of its recipe.

    Args:
        source: A run's folder, a folder that `composer-se slim` wrote, or a file of a checkpoint or of weights. The
            recipe of a file is `recipe.yaml` in its folder or in the folder above.
        recipe_name: The recipe of a checkpoint outside of a run's folder: a path, or a shipped recipe's name.
        data: `NAME`, `NAME:ROOT` or `package.module:name` of the data set whose held-out images are taken. None: the
            recipe's `eval_dataset`.
        device: The device of the network.

    Raises:
        UserError: If a file is missing or damaged, the checkpoint does not fit, or the network has no SE layers.
    """
    run_folder = _run_folder(source)
    if recipe_name is None and run_folder is None:
        raise UserError(f"{source}: found no recipe.yaml beside or above it; name its recipe with --recipe")
    recipe = load_recipe(recipe_name or str(Path(run_folder or ".") / "recipe.yaml"))
    checkpoint = source if source.is_file() else _last_checkpoint(source, recipe)
    check_whole(checkpoint)
    classes = read_classes(run_folder) if run_folder and recipe_name is None else None
    known = len(classes) if classes else None  # None for a run without classes.json: the network's default
    outputs = known if recipe_name is None else count_classes(recipe)
    section = _held_out(recipe, data)
    held_out = plan_data("eval_dataset", section)
    model = plan_model(with_num_classes(without_weights(recipe.model), outputs))  # the weights come from the checkpoint
    algorithms = build_algorithms(plan_section("algorithms", recipe.algorithms))
    split: Split = held_out.images.build(train=False)
    if (
        classes
        and split.classes
        and {*classes} & {*split.classes}
        and classes[: len(split.classes)] != [*split.classes]
    ):
        odd = ", ".join(map(repr, sorted({*classes} ^ {*split.classes})[:5]))
        raise UserError(
            f"--data: its classes are not those that the network was trained on ({odd or 'in another order'}), so "
            "their numbers differ; restore the folders of the classes"
        )
    network = _load(model, algorithms, split, checkpoint, device)
    if not se_blocks(network):
        raise UserError(f"{source}: the network has no Squeeze-and-Excitation layers")
    loader = build_loader(held_out, split, recipe.eval_batch_size, recipe.seed, False, False)
    name = recipe.run_name if source.is_dir() else source.stem
    return Trained(name, network, loader, section["name"], split.classes or classes, checkpoint, run_folder, recipe)


def _run_folder(source: Path) -> Path | None:
    if not source.exists():
        raise UserError(f"{source}: no such run folder or checkpoint")
    candidates = [source] if source.is_dir() else source.resolve().parents[:2]
    found = next((folder for folder in candidates if (folder / "recipe.yaml").is_file()), None)
    if found is None and source.is_dir():
        raise UserError(f"{source}: no run folder, it holds no recipe.yaml")
    return found


def _last_checkpoint(run_folder: Path, recipe: Recipe) -> Path:
    # First in the folder where the run is now, then in the folder where it was trained.
    paths = (run_folder / "checkpoints" / LATEST, run_folder / WEIGHTS, Path(recipe.save_folder) / LATEST)
    checkpoint = next((path for path in paths if os.path.lexists(path)), None)
    if checkpoint is None:
        raise UserError(
            f"{run_folder}: found no {LATEST} in {paths[0].parent} or {paths[-1].parent}; name a checkpoint"
        )
    return checkpoint


def _held_out(recipe: Recipe, data: str | None) -> dict[str, Any]:
    """The section of the data to analyse."""
    section = dict(recipe.eval_dataset or {})
    if data is not None:
        name, _, root = data.partition(":") if data.partition(":")[0] in DATASETS else (data, "", "")
        section = section if section.get("name") == name else {"name": name}
        section |= {"root": root} if root else {}
    elif not section:
        raise UserError("the recipe has no eval_dataset; name held-out data with --data NAME or --data NAME:ROOT")
    return section


def _load(
    model: Component, algorithms: list[Algorithm], split: Split, checkpoint: Path, device: torch.device
) -> nn.Module:
    warnings.filterwarnings("ignore", message="No optimizer was specified")
    network = model.build()
    parts = Parts(network, count_outputs(network, model, split), algorithms)
    weights = read_plain_weights(str(checkpoint))
    if weights is not None:
        parts.algorithms.append(LoadedWeights(weights, str(checkpoint), strict=True, ignored=()))
    try:
        # The Trainer applies the recipe's algorithms, some of which change the network, before it loads the weights.
        trainer = make_trainer(
            parts,
            load_path=str(checkpoint) if weights is None else None,
            load_weights_only=True,
            progress_bar=False,
            device="cpu",
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{checkpoint}: does not fit the recipe's network: {one_line(error)[:300]}") from error
    loaded: Any = trainer.state.model
    end_trainer(trainer)
    return loaded.module.to(device).eval()
