"""What every test starts from."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the first docstring line of compatibility tests into the JUnit report: the title of a row in the table."""
    for item in items:
        test = getattr(item, "function", None)
        if test is not None and test.__doc__ and item.path.name.startswith("test_compat_"):
            item.user_properties.append(("row", test.__doc__.strip().splitlines()[0].rstrip(".")))
