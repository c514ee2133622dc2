"""Registers our algorithm with Composer as soon as both are imported. Never imports Composer itself.

Composer looks in `composer.algorithms` for the algorithms that a checkpoint needs. `composer_se.algorithm` puts ours
there when it is imported. Importing Composer takes five seconds, and most of this package does not need it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["register_algorithm"]


def register_algorithm() -> None:
    """Imports `composer_se.algorithm`: now if Composer is imported already, else right after Composer."""
    if "composer" in sys.modules:
        importlib.import_module("composer_se.algorithm")
    else:
        sys.meta_path.insert(0, _ComposerFinder())


class _ComposerFinder(MetaPathFinder):
    """Lets Python find Composer as usual, and registers the algorithm once Composer has been imported.

    A program that imports this package first, as sorted imports do, and then loads a checkpoint without naming the
    algorithm touches nothing else of ours, and Composer has no entry point for plugins.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == "composer" else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            # Another package of that name must stay importable. Ours then raises an error when it is used.
            with contextlib.suppress(ImportError):
                importlib.import_module("composer_se.algorithm")

        spec.loader.exec_module = execute_and_register
        return spec
