"""The options of Squeeze-and-Excitation that a recipe gives."""

from __future__ import annotations

from composer_se.algorithm import SqueezeExcite
from composer_se.options import SqueezeExciteOptions
from composer_se.recipe.arguments import check_arguments
from composer_se.recipe.schema import Recipe

__all__ = ["squeeze_excite_options"]


def squeeze_excite_options(recipe: Recipe) -> SqueezeExciteOptions | None:
    """What a recipe says under ``algorithms.squeeze_excite``, or None where it has none.

    Raises:
        UserError: If an option is unknown or has a wrong value.
    """
    section = (recipe.algorithms or {}).get("squeeze_excite")
    if section is None:
        return None
    return SqueezeExciteOptions(**check_arguments(SqueezeExcite, section, "algorithms.squeeze_excite"))
