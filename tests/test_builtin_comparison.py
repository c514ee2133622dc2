"""What the README says of Composer's built-in algorithm: that it fails, and that ours does not, on the same input."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import conv_norm_net
from torch import nn
from torch.optim import SGD

import composer_se.functional as ours
from composer_se import SqueezeExciteConv2d

builtin = pytest.importorskip("composer.algorithms.squeeze_excite.squeeze_excite")

IMAGES = torch.randn(4, 3, 8, 8)


def test_two_parameter_groups() -> None:
    model = conv_norm_net((16, 16))
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == wide]} for wide in (True, False)]
    with pytest.raises(RuntimeError, match="unable to infer the group"):
        builtin.apply_squeeze_excite(copy.deepcopy(model), 4, 16, SGD(copy.deepcopy(groups), lr=0.1))
    assert len(ours.apply_squeeze_excite(model, 4, 16, SGD(groups, lr=0.1))) == 2


def test_two_optimizers() -> None:
    model = conv_norm_net((16, 16))
    optimizers = [SGD(model[:3].parameters(), lr=0.1), SGD(model[3:].parameters(), lr=0.1)]
    with pytest.raises(NotImplementedError):
        builtin.apply_squeeze_excite(copy.deepcopy(model), 4, 16, optimizers)
    assert len(ours.apply_squeeze_excite(model, 4, 16, optimizers)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_models_that_are_not_float32(dtype) -> None:
    theirs = conv_norm_net((16, 16)).to(dtype)
    mine = copy.deepcopy(theirs)
    builtin.apply_squeeze_excite(theirs, 4, 16)
    with pytest.raises(RuntimeError, match="dtype"):
        theirs(IMAGES.to(dtype))
    ours.apply_squeeze_excite(mine, 4, 16)
    assert mine(IMAGES.to(dtype)).dtype == dtype


def test_existing_se_blocks() -> None:
    models = pytest.importorskip("torchvision.models")
    theirs, mine = models.regnet_y_400mf(), models.regnet_y_400mf()
    builtin.apply_squeeze_excite(theirs, 4, 16)
    ours.apply_squeeze_excite(mine, 4, 16, min_channels_of="both")

    def layers_in_se(model: nn.Module, layer: type[nn.Module]) -> int:
        blocks = (block for block in model.modules() if type(block).__name__ == "SqueezeExcitation")
        return sum(isinstance(child, layer) for block in blocks for child in block.modules())

    assert layers_in_se(theirs, builtin.SqueezeExciteConv2d) > 0
    assert layers_in_se(mine, SqueezeExciteConv2d) == 0


def test_weights_from_before_the_surgery() -> None:
    plain = conv_norm_net((16, 16))
    theirs, mine = copy.deepcopy(plain), copy.deepcopy(plain)
    builtin.apply_squeeze_excite(theirs, 4, 16)
    ours.apply_squeeze_excite(mine, 4, 16, min_channels_of="both")
    assert "3.weight" in theirs.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert mine.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_share_of_the_channels_that_rounds_to_nothing() -> None:
    theirs, mine = conv_norm_net((16, 16)), conv_norm_net((16, 16))
    builtin.apply_squeeze_excite(theirs, 0.01, 16)
    (wrapper,) = [m for m in theirs.modules() if isinstance(m, builtin.SqueezeExciteConv2d)]
    assert wrapper.se.latent_channels == 0
    added = ours.apply_squeeze_excite(mine, 0.01, 16)
    assert {layer.se.latent_channels for layer in added.values()} == {1}
