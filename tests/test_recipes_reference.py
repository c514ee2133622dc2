"""The reference page of recipes is that of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_reference_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("recipes_reference", DOCS / "recipes_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "recipes-reference.md").read_text() == module.page(), "run `make reference`"
