"""The package without Composer; for the environment that has torch alone."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import composer_se
import composer_se.functional as cf
from composer_se.cli import main

pytestmark = pytest.mark.skipif(importlib.util.find_spec("composer") is not None, reason="Composer is installed")


@pytest.mark.parametrize("name", ["SqueezeExcite", "GateMonitor"])
def test_touching_what_needs_composer_says_what_to_install(name) -> None:
    with pytest.raises(ImportError, match=rf"{name} needs MosaicML Composer.*pip install 'composer-se\[composer\]'"):
        getattr(composer_se, name)


@pytest.mark.parametrize("command", [["train", "digits"], ["plan", "digits"], ["cost"], ["compare", "digits"]])
def test_command_without_the_extra_says_what_to_install(command, capsys) -> None:
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not installed: pip install 'composer-se[recipes]'" in line


def test_loop_of_ones_own_trains() -> None:
    model = nn.Sequential(nn.Conv2d(3, 512, 3), nn.BatchNorm2d(512), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    images = torch.randn(4, 3, 5, 5)
    model(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    added = cf.apply_squeeze_excite(model, latent_channels=64, min_channels=512, optimizers=optimizer)
    assert list(added) == ["0"]
    before = [parameter.clone() for parameter in added["0"].se.parameters()]
    model(images).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, added["0"].se.parameters()))


def test_the_rest_is_there() -> None:
    for name in ("apply_squeeze_excite", "remove_squeeze_excite", "SqueezeExcite2d", "SqueezeExciteConv2d", "surgery"):
        assert getattr(composer_se, name) is not None
