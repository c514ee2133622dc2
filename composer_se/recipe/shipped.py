"""Where the recipes that come with the package are."""

from __future__ import annotations

from pathlib import Path

from composer_se.errors import UserError
from composer_se.recipe.messages import did_you_mean, one_line

__all__ = ["find_recipe", "shipped_recipes"]

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name: those inside the installed package, or of the source checkout beside it."""
    for folder in (_PACKAGE / "yamls", _PACKAGE.parent / "yamls"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find_recipe(recipe: str) -> Path:
    """Turns what the user typed into the path of a recipe.

    Args:
        recipe: A path, or the name of a shipped recipe.

    Returns:
        The path of a file. An existing file wins over a shipped recipe of the same name.

    Raises:
        UserError: There is no such file and no such shipped recipe.
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
