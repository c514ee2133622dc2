"""Reads a recipe: finds the YAML file, applies the overrides of the command line, checks types against the schema."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from composer_se.errors import UserError, did_you_mean, one_line
from composer_se.recipe.schema import COMPONENT_SECTIONS, NAMED_SECTIONS, Recipe, keys

__all__ = ["as_yaml", "find_recipe", "load_recipe", "shipped_recipes"]

_PACKAGE = Path(__file__).resolve().parent.parent

# PyYAML and OmegaConf raise these, besides their own errors, for values such as `2024-13-45`, `!!bool maybe` or lists
# nested a thousand deep.
_PARSER_ERRORS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError, RecursionError)

_TYPES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and checks it against the schema.

    Args:
        recipe: The path of a YAML file, or the name of a shipped recipe.
        overrides: `dotted.key=value` strings, applied in order. The value is YAML. A mapping replaces the recipe's
            mapping and is not merged into it.

    Returns:
        The recipe with defaults filled in and every `${...}` resolved.

    Raises:
        UserError: If the file is missing or not YAML, a key is unknown or missing, or a value has the wrong type or is
            out of range.
    """
    path = find_recipe(recipe)
    config = OmegaConf.structured(Recipe)
    try:
        config = cast(DictConfig, OmegaConf.merge(config, _read(path)))
        for override in overrides:
            _apply(config, override)
        if OmegaConf.is_missing(config, "run_name"):
            config.run_name = path.stem
        missing = sorted(OmegaConf.missing_keys(config), key=lambda key: keys().index(re.split(r"[.\[]", key)[0]))
        if missing:
            raise UserError(f"{missing[0]}: required, but the recipe doesn't set it")
        OmegaConf.resolve(config)
        loaded = cast(Recipe, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error
    except _PARSER_ERRORS as error:
        raise UserError(f"{path}: can't be read: {one_line(error) or type(error).__name__}") from error
    _check_values(dataclasses.asdict(loaded), "")
    _check_shape(loaded)
    return loaded


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe as a YAML file that can be run again."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)))


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name, from the installed package or from the source checkout."""
    for folder in (_PACKAGE / "yamls", _PACKAGE.parent / "yamls"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find_recipe(recipe: str) -> Path:
    """Finds the file of a recipe.

    Args:
        recipe: A path, or the name of a shipped recipe.

    Returns:
        The path of a file. An existing file takes precedence over a shipped recipe of the same name.

    Raises:
        UserError: If there is no such file and no such shipped recipe.
    """
    try:
        path = Path(recipe).expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, an unknown user after ~, a NUL
        raise UserError(f"recipe {recipe!r} can't be read: {one_line(error)}") from error
    shipped = shipped_recipes()
    if recipe in shipped:
        return shipped[recipe]
    if path.is_dir():
        raise UserError(f"recipe {recipe!r} is a folder; give the path of a YAML file")
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"recipe file {recipe!r} does not exist{did_you_mean(path.stem, shipped)}")
    raise UserError(f"recipe {recipe!r} is neither a file nor a shipped recipe{did_you_mean(recipe, shipped)}")


def _read(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{path}: no valid YAML: {where}{one_line(error.problem or error)}") from error
    except (OSError, yaml.YAMLError, *_PARSER_ERRORS) as error:
        raise UserError(f"{path}: can't be read: {one_line(error) or type(error).__name__}") from error
    if isinstance(content, ListConfig) or not content:
        raise UserError(f"{path}: a recipe is a mapping with the sections {', '.join(NAMED_SECTIONS)}, ...")
    return cast(DictConfig, content)


def _apply(config: DictConfig, override: str) -> None:
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise UserError(f"override {override!r} is not of the form key=value (for example seed=1)")
    section, dot, _ = key.partition(".")
    try:
        # OmegaConf's own loader, so that 1e-4 is a number here as it is in a recipe file.
        parsed = OmegaConf.create(f"value: {text}" if text.strip() else "value: ''")
        value = cast(dict, OmegaConf.to_container(parsed, resolve=False))["value"]
        if dot and section in config and config[section] is None:  # OmegaConf from 2.4 on can't set a key below null
            config[section] = {}
        OmegaConf.update(config, key, value, merge=False)
    except OmegaConfBaseException:
        raise
    except yaml.YAMLError as error:
        raise UserError(f"{key}: {text!r} is no valid YAML") from error
    except _PARSER_ERRORS as error:
        raise UserError(f"override {override!r}: {one_line(error) or type(error).__name__}") from error


def _explain(error: OmegaConfBaseException) -> str:
    """Returns one line about an error of OmegaConf, with the full path of the key."""
    key = error.full_key or (str(error.key) if error.key is not None else "recipe")
    problem = one_line(str(error.msg or error).split("\n")[0])
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and "." not in key:
        return f"{key}: unknown key{did_you_mean(key, keys())}"
    if problem.endswith("is not Optional"):
        return f"{key}: required; it can't be null"
    if "is not a ListConfig" in problem:
        return f"{key}: expected a list, in brackets: [..., ...]"
    wrong_type = re.fullmatch(r"Value (.*) of type .* could not be converted to (\w+)", problem)
    if wrong_type and wrong_type[2] in _TYPES:
        return f"{key}: expected {_TYPES[wrong_type[2]]}, got {wrong_type[1]}"
    return f"{key}: {problem}"


def _check_values(value: Any, key: str) -> None:
    """Refuses numbers that are too large or not finite, and strings that can't be written to a file."""
    if isinstance(value, dict):
        for name, content in value.items():
            _check_values(content, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, content in enumerate(value):
            _check_values(content, f"{key}[{index}]")
    elif isinstance(value, int) and value.bit_length() > 64:
        raise UserError(f"{key}: a number of {value.bit_length()} bits is too large")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}: expected a finite number, got {value}")
    elif isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{key}: {value!r} holds a character that can't be written to a file")


def _check_shape(recipe: Recipe) -> None:
    """Checks the contents of the sections, which the schema leaves open."""
    for section in NAMED_SECTIONS:
        content = getattr(recipe, section)
        if content is not None and not isinstance(content.get("name"), str):
            raise UserError(f"{section}.name: required: a name of a {section.replace('_', ' ')}")
    for section in COMPONENT_SECTIONS:
        for name, arguments in (getattr(recipe, section) or {}).items():
            if arguments is not None and not isinstance(arguments, dict):
                raise UserError(
                    f"{section}.{name}: expected a mapping of its arguments ({{}} for none, null to remove it), "
                    f"got {arguments!r}"
                )
