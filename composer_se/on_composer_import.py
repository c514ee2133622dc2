"""Registers our algorithm with Composer as soon as both are imported. Never imports Composer itself.

Composer looks in `composer.algorithms` for the algorithms that a checkpoint needs. `composer_se.algorithm` puts ours
there. Importing Composer takes five seconds, and most of this package does not need it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_algorithm"]


def register_algorithm() -> None:
    """Imports `composer_se.algorithm`: now if Composer is imported already, else right after Composer."""
    if "composer" in sys.modules:
        importlib.import_module("composer_se.algorithm")
    else:
        sys.meta_path.insert(0, _ComposerFinder())


class _ComposerFinder(MetaPathFinder):
    """The first finder until Composer is imported. Libraries that only look Composer up do not import it."""

    asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "composer" or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec("composer")
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            # Another package of that name must stay importable. Ours then raises an error when it is used.
            with contextlib.suppress(ImportError):
                importlib.import_module("composer_se.algorithm")

        spec.loader.exec_module = execute_and_register
        return spec
