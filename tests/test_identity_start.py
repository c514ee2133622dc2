"""Blocks that start at identity leave a network as it is, and don't mix with those that don't."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cheap_models import build, classifier_arguments, detection_arguments, detection_targets, tensors_of
from helpers import conv_norm_net
from torch import Tensor, nn

from composer_se import SqueezeExciteConv2d, apply_squeeze_excite, remove_squeeze_excite

models: Any = pytest.importorskip("torchvision").models


def assert_surgery_changes_no_bit(model: nn.Module, call: Callable[[nn.Module], Any], **options: Any) -> None:
    """Calls the network before and after the surgery: in training mode with gradients, and in evaluation mode."""

    def outputs(training: bool) -> list[Tensor]:
        torch.manual_seed(1)
        with torch.set_grad_enabled(training):
            return list(tensors_of(call(model.train(training))))

    before = [*outputs(True), *outputs(False)]
    assert apply_squeeze_excite(model, 4, 1, init="identity", **options)
    in_evaluation = outputs(False)  # first, since training moves running statistics
    after = [*outputs(True), *in_evaluation]
    assert len(before) == len(after) > 0
    # Single pixels may overflow in networks of random weights.
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_torchvision_classification_gives_the_same_bits(name: str) -> None:
    size, arguments = classifier_arguments(name)
    model = build(models.get_model, name, **arguments)
    x = torch.randn(2, 3, size, size)
    assert_surgery_changes_no_bit(model, lambda model: model(x))


@pytest.mark.parametrize("name", models.list_models(module=models.segmentation))
def test_torchvision_segmentation_gives_the_same_bits(name: str) -> None:
    model = build(models.get_model, name, weights=None, weights_backbone=None)
    x = torch.randn(2, 3, 32, 32)
    assert_surgery_changes_no_bit(model, lambda model: model(x))


@pytest.mark.parametrize("name", models.list_models(module=models.detection))
def test_torchvision_detection_gives_the_same_bits(name: str) -> None:
    model = build(models.get_model, name, **detection_arguments(name))
    images = list(torch.rand(2, 3, 64, 64))
    assert_surgery_changes_no_bit(model, lambda model: model(images, detection_targets() if model.training else None))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("placement", ["conv", "norm"])
def test_every_placement_and_layout_gives_the_same_bits(placement: str, memory_format: torch.memory_format) -> None:
    model = conv_norm_net().to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    x = torch.randn(4, 3, 9, 9).to(memory_format=memory_format)
    assert_surgery_changes_no_bit(model, lambda model: model(x), placement=placement)


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
