"""Writes a run's report from the files in its folder."""

from __future__ import annotations

import base64
import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jinja2
import torch

from composer_se.errors import UserError
from composer_se.files import replace_file
from composer_se.parts.data import image_size
from composer_se.parts.models import with_num_classes, without_weights
from composer_se.planning import Plan, plan
from composer_se.recipe.load import load_recipe
from composer_se.recipe.run_folder import read_classes
from composer_se.recipe.schema import Recipe
from composer_se.recipe.validate import plan_network, squeeze_excite_options
from composer_se.report import contents

__all__ = ["write_report"]


def write_report(run_folder: Path) -> Path:
    """Writes `report.html` into a run's folder. Overwrites an earlier report.

    The folder must hold `recipe.yaml`. The report also shows these files if they exist: `summary.json`, `classes.json`,
    `metrics.jsonl`, `gates/gates.json` and `gates/gates.png` of `composer-se gates`, and `cost.json` of
    `composer-se cost --json RUN/cost.json`.

    Returns:
        The path of the report.

    Raises:
        UserError: If the folder holds no recipe, the recipe is wrong, or the report can't be written.
    """
    recipe_file = run_folder / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"{run_folder}: no run folder, it holds no recipe.yaml")
    recipe = load_recipe(str(recipe_file))
    classes = read_classes(run_folder)
    lines = _read_lines(run_folder / "metrics.jsonl")
    gates = run_folder / "gates"
    html = _template().render(
        title=recipe.run_name,
        outcome=contents.outcome(_read_json(run_folder / "summary.json")),
        classes=contents.classes(classes),
        curves=contents.curves(lines),
        gates_in_training=contents.gates_in_training(lines),
        gates_after_training=contents.gates_after_training(
            _read_json(gates / "gates.json"), _as_data_url(gates / "gates.png")
        ),
        plan=_plan(recipe, len(classes) if classes else None),
        cost=contents.cost(_read_json(run_folder / "cost.json")),
        recipe=recipe_file.read_text(),
    )
    target = run_folder / "report.html"
    replace_file(target, html)
    return target


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.jinja")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was killed
            found.append(json.loads(line))
    return found


def _as_data_url(path: Path) -> str | None:
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _plan(recipe: Recipe, num_classes: int | None) -> Plan | None:
    """Plans SE on the recipe's network; None if the recipe has no SE."""
    options = squeeze_excite_options(recipe)
    if options is None:
        return None
    model = with_num_classes(without_weights(recipe.model), num_classes)
    component = plan_network(replace(recipe, model=model))
    try:
        with torch.device("meta"):  # only the shapes are needed
            network = component.build()
    except UserError:  # some networks, RegNet for instance, read values of tensors while they are built
        with torch.random.fork_rng(devices=[]):
            network = component.build()
    return plan(network, image_size=image_size(recipe.train_dataset), **asdict(options))
