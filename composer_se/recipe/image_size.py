"""How large the images of a recipe's data are, without reading any."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from composer_se.recipe.datasets import dataset_builder

__all__ = ["image_size"]

_FIXED = {"digits": 8, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32}


def image_size(section: Mapping[str, Any]) -> int | None:
    """Height and width in pixels of what a network gets from a data set, or None where that is not known.

    Args:
        section: The recipe's `train_dataset` or `eval_dataset`.
    """
    name = section["name"]
    if name in _FIXED:
        return _FIXED[name]
    parameter = inspect.signature(dataset_builder(name, "name")).parameters.get("image_size")
    return None if parameter is None else section.get("image_size", parameter.default)
