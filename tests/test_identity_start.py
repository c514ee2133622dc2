"""Blocks that start at identity leave a network as it is, and don't mix with those that don't.

`test_compat_models` tries the first on every network of torchvision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cheap_models import assert_identity_start_changes_no_bit
from helpers import conv_norm_net
from torch import nn

from composer_se import SqueezeExciteConv2d, apply_squeeze_excite, remove_squeeze_excite


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("placement", ["conv", "norm"])
def test_every_placement_and_layout_gives_the_same_bits(placement: str, memory_format: torch.memory_format) -> None:
    model = conv_norm_net().to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    x = torch.randn(4, 3, 9, 9).to(memory_format=memory_format)
    assert_identity_start_changes_no_bit(model, lambda model: model(x), placement=placement)


@pytest.mark.parametrize("placement", ["conv", "norm"])
def test_gates_move_in_the_first_step_and_the_first_layer_in_the_second(placement: str) -> None:
    model = conv_norm_net()
    apply_squeeze_excite(model, 4, 1, init="identity", placement=placement)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(8, 3, 9, 9), torch.randint(4, (8,))
    for step in range(2):
        before = copy.deepcopy(model.state_dict())
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, t in model.state_dict().items() if ".se." in name and not torch.equal(t, before[name])}
        layers = {"4"} if step == 0 else {"2", "4"}
        assert {name.split(".")[-2] for name in moved} == layers


def test_a_moved_block_scales_by_twice_the_sigmoid() -> None:
    torch.manual_seed(0)
    wrapped = SqueezeExciteConv2d(3, 8, 3, latent_channels=4, init="identity", followed_by_norm=True)
    first, last = wrapped.se.pool_and_mlp["2"].weight, wrapped.se.pool_and_mlp["4"].weight
    nn.init.normal_(last)
    x, norm = torch.randn(2, 3, 6, 6), nn.BatchNorm2d(8)
    u = wrapped.conv(x)
    gates = 2 * torch.sigmoid(torch.relu(u.mean((2, 3)) @ first.T) @ last.T)
    expected = norm(u * gates[..., None, None])
    torch.testing.assert_close(norm(wrapped(x)), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(wrapped(x)), expected)
    torch.testing.assert_close(norm(wrapped.se(u)), expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("of_weights", "of_network"), [("identity", "default"), ("default", "identity")])
def test_weights_of_the_other_start_are_refused_by_the_name_of_the_option(
    of_weights: str, of_network: str, strict: bool
) -> None:
    model, other = conv_norm_net(), conv_norm_net()
    apply_squeeze_excite(model, 4, 16, init=of_weights)
    apply_squeeze_excite(other, 4, 16, init=of_network)
    with pytest.raises(RuntimeError, match=f'3.se.init_identity: .* block with init="{of_weights}"'):
        other.load_state_dict(model.state_dict(), strict=strict)


def test_weights_of_the_same_start_and_plain_weights_load() -> None:
    plain = conv_norm_net()
    model = copy.deepcopy(plain)
    apply_squeeze_excite(model, 4, 1, init="identity")
    nn.init.normal_(model[3].se.pool_and_mlp["4"].weight)  # pyright: ignore[reportAttributeAccessIssue]
    again = conv_norm_net()
    apply_squeeze_excite(again, 4, 1, init="identity")
    again.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(4, 3, 9, 9)
    assert torch.equal(again(x), plain(x))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), model(x))
    assert not torch.equal(again(x), plain(x))


def test_copies_and_removal_keep_the_network() -> None:
    model = conv_norm_net()
    x = torch.randn(4, 3, 9, 9)
    expected = model(x)
    apply_squeeze_excite(model, 4, 1, init="identity")
    assert torch.equal(copy.deepcopy(model)(x), expected)
    remove_squeeze_excite(model)
    assert torch.equal(model(x), expected)
    assert not any("se" in name.split(".") for name in model.state_dict())


@pytest.mark.parametrize("make", [SqueezeExciteConv2d, lambda *a, **k: apply_squeeze_excite(conv_norm_net(), **k)])
def test_a_misspelt_start_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match='init is \'idenity\'; choose "default", or "identity" for networks'):
        make(3, 8, 3, init="idenity")
