"""Writes the files of a slimmed network: weights, a recipe that trains it further, numbers and picture."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from composer_se.files import replace_file
from composer_se.parts.models import without_weights
from composer_se.recipe.checkpoints import WEIGHTS
from composer_se.recipe.load import as_yaml
from composer_se.recipe.schema import Recipe
from composer_se.selection import following_norms
from composer_se.show.text import to_json
from composer_se.slim.picture import draw
from composer_se.wrapper import SqueezeExcited

__all__ = ["slim_recipe", "write"]


def slim_recipe(recipe: Recipe, network: nn.Module, folder: Path) -> Recipe:
    """The recipe that trains the slimmed network further, from its weights.

    Args:
        recipe: The original recipe. The new recipe adds "-slim" to its run name and run folder.
        network: The network without the removed blocks.
        folder: The folder of the weights.
    """
    kept = _convs_with_block(network)
    algorithms = dict(recipe.algorithms or {})
    section = algorithms.pop("squeeze_excite")
    if kept:
        algorithms["squeeze_excite"] = {**section, "include": kept}
    run_folder = f"{recipe.run_folder}-slim"
    return dataclasses.replace(
        recipe,
        model=without_weights(recipe.model),
        algorithms=algorithms,
        run_name=f"{recipe.run_name}-slim",
        run_folder=run_folder,
        save_folder=f"{run_folder}/checkpoints",
        load_path=str(folder / WEIGHTS),
        load_strict_model_weights=True,
        load_ignore_keys=None,
    )


def _convs_with_block(network: nn.Module) -> list[str]:
    """The names of the convs with a block, as the plain network has them. The block may follow the conv's norm."""
    names = {module: name for name, module in network.named_modules()}
    norms = {norm: conv for conv, norm in following_norms(network).items() if isinstance(conv, nn.Conv2d)}
    return [names[norms.get(module, module)] for module in names if isinstance(module, SqueezeExcited)]


def write(folder: Path, recipe: Recipe, network: nn.Module, found: Mapping[str, Any]) -> list[Path]:
    """Writes weights.pt, recipe.yaml, slim.json and slim.png. A kill leaves each file complete, old or new.

    Args:
        folder: The folder; created if it doesn't exist.
        recipe: The recipe that `slim_recipe` returned.
        network: The network without the removed blocks.
        found: The content of `slim.json`.

    Returns:
        The files.

    Raises:
        UserError: If a file can't be written.
    """
    weights, picture = io.BytesIO(), io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in network.state_dict().items()}, weights)
    draw(found, picture)
    content = {
        WEIGHTS: weights.getvalue(),
        "recipe.yaml": as_yaml(recipe),
        "slim.json": to_json(found),
        "slim.png": picture.getvalue(),
    }
    for name, what in content.items():
        replace_file(folder / name, what)
    return [folder / name for name in content]
