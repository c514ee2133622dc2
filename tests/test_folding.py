"""Constant gates multiply into the layer in front of them, and their blocks are gone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import conv_norm_net
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD

from composer_se import SqueezeExciteConv2d, apply_squeeze_excite, fold_constant_gates
from composer_se.wrapper import SqueezeExcited

IMAGES = torch.randn(4, 3, 8, 8, dtype=torch.float64)

CONVS: dict[str, dict[str, Any]] = {
    "with a bias": {},
    "without a bias": {"bias": False},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 8},
}


NORMS = {
    "batch norm": nn.BatchNorm2d(8),
    "group norm": nn.GroupNorm(2, 8),
    "instance norm": nn.InstanceNorm2d(8, affine=True),
}


def network(**of_conv: Any) -> nn.Sequential:
    conv = nn.Conv2d(8, 8, 3, padding=1, **of_conv)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    apply_squeeze_excite(model, 4, 8)
    return model.double()


def network_with_block_after(norm: nn.Module) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), copy.deepcopy(norm), nn.ReLU())
    apply_squeeze_excite(model, 4, 8, placement="norm")
    return model.double()


def make_constant(wrapper: SqueezeExcited) -> Tensor:
    """Makes the gates of a block constant by its weights, and returns them."""
    weight = wrapper.se.pool_and_mlp["4"].weight
    nn.init.zeros_(weight)
    return torch.full(weight.shape[:1], 0.5, dtype=torch.float64)


@pytest.mark.parametrize("of_conv", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_stay_where_gates_are_constant(of_conv: dict[str, Any], training: bool) -> None:
    model = network(**of_conv).train(training)
    conv, kept = model[1].conv, model[0]
    gates = make_constant(model[1])
    expected = copy.deepcopy(model)(IMAGES)
    assert fold_constant_gates(model, {"1": gates}) == {"1": conv}
    assert model[1] is conv
    assert model[0] is kept
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_stay_where_gates_after_a_norm_are_constant(norm: nn.Module, training: bool) -> None:
    model = network_with_block_after(norm).train(training)
    torch.nn.init.uniform_(model[1].norm.weight)
    torch.nn.init.uniform_(model[1].norm.bias)
    gates = make_constant(model[1])
    expected = copy.deepcopy(model)(IMAGES)
    bare = fold_constant_gates(model, {"1": gates})
    assert bare == {"1": model[1]}
    assert type(model[1]) is type(norm)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-12, atol=1e-12)
    assert list(apply_squeeze_excite(model, 4, 8)) == ["0"]  # which has no mark any more


def test_a_layer_norm_of_whole_maps_takes_the_gates() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm([8, 6, 4]))
    apply_squeeze_excite(model, 4, 8, placement="norm")
    model = model.double().eval()
    gates = make_constant(model[1])
    images = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    expected = copy.deepcopy(model)(images)
    fold_constant_gates(model, {"1": gates})
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


def test_gates_of_a_block_that_starts_at_identity_are_what_scales() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    apply_squeeze_excite(model, 4, 8, init="identity")
    expected = model(IMAGES.float())
    fold_constant_gates(model, {"0": torch.ones(8)})
    assert torch.equal(model(IMAGES.float()), expected)


class StandardisedConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight / self.weight.norm(), self.bias)


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.silu(super().forward(input))


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (ActivatedNorm(8), "1 is a ActivatedNorm, whose output does not grow with its weight"),
        (nn.BatchNorm2d(8, affine=False), "1 is a BatchNorm2d without a plain weight"),
    ],
)
def test_norm_that_can_not_take_the_gates_is_refused(norm: nn.Module, message: str) -> None:
    model = network_with_block_after(norm)
    with pytest.raises(ValueError, match=message):
        fold_constant_gates(model, {"1": torch.full((8,), 0.5)})
    assert isinstance(model[1], SqueezeExcited)


def test_conv_that_standardises_its_weight_is_refused() -> None:
    model = nn.Sequential(StandardisedConv(3, 8, 3))
    apply_squeeze_excite(model, 4, 8)
    with pytest.raises(ValueError, match="0 is a StandardisedConv, whose output does not grow with its weight"):
        fold_constant_gates(model, {"0": torch.full((8,), 0.5)})


def test_each_channel_is_scaled_by_its_own_gate() -> None:
    model = network()
    u = model[0].conv(IMAGES)
    gates = torch.linspace(0, 2, 8)
    fold_constant_gates(model, {"0": gates})
    torch.testing.assert_close(model[0](IMAGES), u * gates.double().view(-1, 1, 1))


def test_shared_conv_is_folded_once_and_bare_in_both_places() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.BatchNorm2d(3))})
    apply_squeeze_excite(model, 4, 3)
    weight = shared.weight.detach().clone()
    fold_constant_gates(model, {"b.0": torch.full((3,), 0.5)})
    assert model["a"][0] is model["b"][0] is shared
    assert torch.equal(shared.weight, weight / 2)


def test_parameters_of_removed_blocks_leave_the_optimizer() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    weight = model[1].conv.weight
    fold_constant_gates(model, {"1": torch.ones(8)}, optimizer)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    assert weight in optimizer.state


TIED, OWN_WEIGHT = "another has its weight", "its weight is computed"

MISTAKES: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown name": ({"1": torch.ones(8), "l": torch.ones(8)}, "no layer 'l'"),
    "wrong shape": ({"0": torch.ones(8), "1": torch.ones(1, 8)}, r"1 has 8 channels, but gates of shape \(1, 8\)"),
    "not finite": ({"0": torch.ones(8), "1": torch.full((8,), torch.nan)}, "those of 1 are not all finite"),
    "the same layer twice": ({"1": torch.ones(8), "again": torch.ones(8)}, "1 and again are the same layer"),
    TIED: ({"0": torch.ones(8), "1": torch.ones(8)}, "1 shares its weights"),
    OWN_WEIGHT: ({"0": torch.ones(8), "1": torch.ones(8)}, "1 is a Parametrized.*without a plain weight"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_change_nothing(mistake: str) -> None:
    gates, message = MISTAKES[mistake]
    model = network()
    model.add_module("again", model[1])
    if mistake == TIED:
        model.add_module("other", nn.Conv2d(8, 8, 3))
        model.other.weight = model[1].conv.weight
    elif mistake == OWN_WEIGHT:
        parametrizations.weight_norm(model[1].conv)
    modules, state = list(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fold_constant_gates(model, gates)
    assert list(model.named_modules()) == modules
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="none of the model's parameters"):
        fold_constant_gates(model, {"1": torch.ones(8)}, SGD(conv_norm_net().parameters()))
    assert isinstance(model[1], SqueezeExciteConv2d)
