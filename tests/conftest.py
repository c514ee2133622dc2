"""What every test starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from composer_se import ops
from composer_se.measure import timing

# In tests the norm takes the gates of the smallest maps too.
_SHIPPED, ops.MIN_NUMEL = ops.MIN_NUMEL, 0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _short_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on how long something takes."""
    monkeypatch.setattr(timing, "VISIT_SECONDS", 0.05)


@pytest.fixture
def as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps are treated as in other processes, for comparisons with these bit by bit."""
    monkeypatch.setattr(ops, "MIN_NUMEL", _SHIPPED)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a digits run of one epoch, watched by the gate monitor. Not to be changed: copy it."""
    from composer_se.cli import main

    folder = tmp_path_factory.mktemp("runs") / "digits"
    overrides = ["max_duration=1ep", f"run_folder={folder}", "callbacks.gate_monitor={interval: 10ba}"]
    assert main(["train", "digits", "progress_bar=false", *overrides]) == 0
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the first docstring line of compatibility tests into the JUnit report: the title of a row in the table."""
    for item in items:
        test = getattr(item, "function", None)
        if test is not None and test.__doc__ and item.path.name.startswith("test_compat_"):
            item.user_properties.append(("row", test.__doc__.strip().splitlines()[0].rstrip(".")))
