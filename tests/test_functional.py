"""`apply_squeeze_excite` and `remove_squeeze_excite` in plain PyTorch programs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import conv_norm_net, saved_bytes
from torch import nn
from torch.optim import SGD, Adam, Optimizer

import composer_se.functional as cf
from composer_se import SqueezeExciteConv2d, surgery

IMAGES = torch.randn(4, 3, 8, 8)


def train_step(model: nn.Module, *optimizers: Optimizer) -> None:
    loss = model(IMAGES).square().sum()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: nn.Module, *optimizers: Optimizer) -> Any:
    modules = [(name, id(module)) for name, module in model.named_modules()]
    groups = [[[id(p) for p in group["params"]] for group in optimizer.param_groups] for optimizer in optimizers]
    marks = [hasattr(module, "_already_squeeze_excited") for module in model.modules()]
    return modules, groups, marks, {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(before: Any, after: Any) -> None:
    assert before[:3] == after[:3]
    torch.testing.assert_close(before[3], after[3], rtol=0, atol=0)


def assert_equal_training(model: nn.Module, other: nn.Module) -> None:
    train_step(model)
    train_step(other)
    for (name, parameter), its_twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, its_twin), name
        assert parameter.grad is not None, name
        assert its_twin.grad is not None, name
        assert torch.equal(parameter.grad, its_twin.grad), name


def test_returns_what_it_wrapped_in_model_order() -> None:
    model = conv_norm_net((8, 16, 32))
    conv = model[3]
    added = cf.apply_squeeze_excite(model, 4, 16)
    assert list(added) == ["3", "6"]
    assert added["3"] is model[3]
    assert added["3"].conv is conv
    assert added["3"].se.latent_channels == 4


def test_applying_again_changes_nothing() -> None:
    model = conv_norm_net()
    optimizer = SGD(model.parameters(), lr=0.1)
    cf.apply_squeeze_excite(model, 4, 16, optimizer)
    before = snapshot(model, optimizer)
    assert cf.apply_squeeze_excite(model, 4, 16, optimizer) == {}
    assert_same(before, snapshot(model, optimizer))


def test_initial_weights_are_those_of_composer_under_the_same_seed() -> None:
    builtin = pytest.importorskip("composer.algorithms.squeeze_excite.squeeze_excite")
    ours = conv_norm_net((16, 16))
    theirs = copy.deepcopy(ours)
    torch.manual_seed(3)
    cf.apply_squeeze_excite(ours, 4, 16, min_channels_of="both")
    torch.manual_seed(3)
    builtin.apply_squeeze_excite(theirs, 4, 16)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_train(dtype) -> None:
    model = conv_norm_net().to(dtype)
    cf.apply_squeeze_excite(model, 4, 16)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    out = model(IMAGES.to(dtype))
    out.sum().backward()
    assert out.dtype == dtype


def test_eval_mode_stays() -> None:
    model = conv_norm_net().eval()
    cf.apply_squeeze_excite(model, 4, 16)
    assert not any(module.training for module in model.modules())


def test_shared_conv_stays_shared() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), conv, nn.BatchNorm2d(8), conv, nn.BatchNorm2d(8))
    added = cf.apply_squeeze_excite(model, 4, 8)
    assert list(added) == ["0", "1"]
    assert model[1] is model[3]
    train_step(model)


def test_new_parameters_join_the_group_that_holds_the_convs_weight() -> None:
    model = conv_norm_net((8, 16))
    slow, fast = model[0].parameters(), [p for layer in model[1:] for p in layer.parameters()]
    optimizer = SGD([{"params": slow, "lr": 0.01}, {"params": fast, "lr": 0.1}])
    added = cf.apply_squeeze_excite(model, 4, 8, optimizer)
    first, second = (set(group["params"]) for group in optimizer.param_groups)
    assert set(added["0"].se.parameters()) <= first
    assert set(added["3"].se.parameters()) <= second
    assert first | second == set(model.parameters())


def test_two_optimizers_each_get_their_own() -> None:
    model = conv_norm_net((8, 16))
    first = SGD(model[:3].parameters(), lr=0.1, momentum=0.9)
    second = Adam(model[3:].parameters())
    train_step(model, first, second)
    momentum = first.state[model[0].weight]["momentum_buffer"].clone()
    weight = model[0].weight
    added = cf.apply_squeeze_excite(model, 4, 8, [first, second])
    assert set(added["0"].se.parameters()) <= set(first.param_groups[0]["params"])
    assert set(added["3"].se.parameters()) <= set(second.param_groups[0]["params"])
    assert torch.equal(first.state[weight]["momentum_buffer"], momentum)
    before = [parameter.clone() for parameter in added["3"].se.parameters()]
    train_step(model, first, second)
    assert not any(torch.equal(a, b) for a, b in zip(before, added["3"].se.parameters(), strict=True))


def test_block_of_a_frozen_conv_joins_the_first_group_and_the_log_says_so(caplog) -> None:
    model = conv_norm_net((8, 16))
    model[0].requires_grad_(False)
    optimizer = SGD([{"params": model[4].parameters()}, {"params": model[3].parameters()}], lr=0.1)
    with caplog.at_level("INFO", "composer_se"):
        added = cf.apply_squeeze_excite(model, 4, 8, optimizer)
    assert set(added["0"].se.parameters()) <= set(optimizer.param_groups[0]["params"])
    assert set(added["3"].se.parameters()) <= set(optimizer.param_groups[1]["params"])
    assert "No optimizer holds what 2 new parameters belong to" in caplog.text


def test_state_dict_from_before_the_surgery_loads() -> None:
    plain = conv_norm_net()
    model = copy.deepcopy(plain)
    added = cf.apply_squeeze_excite(model, 4, 16)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    incompatible = model.load_state_dict(plain.state_dict(), strict=False)
    assert incompatible.unexpected_keys == []
    assert all(".se." in key for key in incompatible.missing_keys)
    assert torch.equal(added["3"].conv.weight, plain[3].weight)


def test_state_dict_of_composers_surgery_loads_strictly() -> None:
    builtin = pytest.importorskip("composer.algorithms.squeeze_excite.squeeze_excite")
    ours, theirs = conv_norm_net((16, 16)), conv_norm_net((16, 16))
    cf.apply_squeeze_excite(ours, 4, 16, min_channels_of="both")
    builtin.apply_squeeze_excite(theirs, 4, 16)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(IMAGES), theirs.eval()(IMAGES))


def test_convs_before_norms_are_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.conv2, self.relu = nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True)
            self.conv3 = nn.Conv2d(8, 8, 1)

    added = cf.apply_squeeze_excite(Net(), 4, 8)
    assert {name: wrapper.followed_by_norm for name, wrapper in added.items()} == {
        "conv1": True,
        "conv2": False,
        "conv3": False,
    }


def test_network_without_norms_trains_by_default() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True))
    cf.apply_squeeze_excite(model, 4, 8)
    train_step(model)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("order", [1, -1])
def test_conv_shared_with_a_parent_without_norm_does_not_count_as_before_one(order) -> None:
    conv = nn.Conv2d(8, 8, 1)
    parents = [nn.Sequential(conv, nn.BatchNorm2d(8)), nn.Sequential(conv, nn.ReLU(inplace=True))]
    model = nn.ModuleList(parents[::order])
    (wrapper,) = cf.apply_squeeze_excite(model, 4, 8).values()
    assert not wrapper.followed_by_norm


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_conv_norm_network_needs_no_more_activation_memory_than_without(memory_format) -> None:
    plain = conv_norm_net((16, 32, 64)).to(memory_format=memory_format)
    images = torch.randn(8, 3, 32, 32).to(memory_format=memory_format)
    model = copy.deepcopy(plain)
    assert len(cf.apply_squeeze_excite(model, 4, 16)) == 3
    assert saved_bytes(model, images) <= 1.02 * saved_bytes(plain, images)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_network_without_norms_needs_at_most_one_more_map_per_conv(memory_format) -> None:
    convs = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)]
    plain = nn.Sequential(convs[0], nn.ReLU(inplace=True), convs[1], nn.ReLU(inplace=True))
    plain.to(memory_format=memory_format)
    images = torch.randn(8, 3, 32, 32).to(memory_format=memory_format)
    model = copy.deepcopy(plain)
    assert len(cf.apply_squeeze_excite(model, 4, 16)) == 2
    map_bytes = 8 * 16 * 32 * 32 * 4
    assert saved_bytes(model, images) - saved_bytes(plain, images) < 2.02 * map_bytes


def test_no_fitting_conv_warns_of_the_largest_width(caplog) -> None:
    model = conv_norm_net((8, 16, 32))
    assert cf.apply_squeeze_excite(model, 4, 64) == {}
    assert "has 32 output channels" in caplog.text
    assert "min_channels='auto'" in caplog.text


def test_no_conv_left_by_the_patterns_warns_of_them(caplog) -> None:
    cf.apply_squeeze_excite(conv_norm_net((8, 16)), 4, "auto", exclude="*")
    assert "Its convs: 2 excluded by '*'" in caplog.text
    assert "min_channels" not in caplog.text


def test_no_conv_at_all_warns(caplog) -> None:
    cf.apply_squeeze_excite(nn.Sequential(nn.Linear(2, 2)))
    assert "Sequential has no Conv2d" in caplog.text


def test_narrow_blocks_are_noted_once(caplog) -> None:
    with caplog.at_level("INFO", "composer_se"):
        cf.apply_squeeze_excite(conv_norm_net((64, 64)), 0.25, 64)
        assert caplog.text.count("has 16 latent channels; at least 64 are recommended") == 1
        caplog.clear()
        cf.apply_squeeze_excite(conv_norm_net((64, 64)), 64, 64)
        assert "recommended" not in caplog.text


BAD_ARGUMENTS = {
    "latent_channels out of range": ({"latent_channels": 3.5}, ValueError),
    "latent_channels no number": ({"latent_channels": "64"}, TypeError),
    "min_channels out of range": ({"min_channels": 0}, ValueError),
    "min_channels no number": ({"min_channels": "all"}, TypeError),
    "include": ({"include": "nothing.like.this"}, ValueError),
    "optimizer of another model": ({"optimizers": SGD([nn.Parameter(torch.ones(1))], lr=0.1)}, ValueError),
    "no optimizer": ({"optimizers": ["sgd"]}, TypeError),
}


@pytest.mark.parametrize(("arguments", "error"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_wrong_input_changes_nothing(arguments, error) -> None:
    model = conv_norm_net()
    optimizer = SGD(model.parameters(), lr=0.1)
    before = snapshot(model, optimizer)
    with pytest.raises(error):
        cf.apply_squeeze_excite(
            model, **{"latent_channels": 4, "min_channels": 8, "optimizers": optimizer, **arguments}
        )
    assert_same(before, snapshot(model, optimizer))


def test_inplace_of_earlier_versions_is_answered_by_one_warning_and_changes_nothing(caplog) -> None:
    model = conv_norm_net()
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    expected = cf.apply_squeeze_excite(model, 4, 16)
    assert caplog.messages == []
    torch.manual_seed(3)
    added = cf.apply_squeeze_excite(other, 4, 16, inplace=False)
    assert caplog.messages == ["inplace=False is not needed any more and does nothing: leave it out."]
    assert list(added) == list(expected)
    assert_equal_training(model, other)


def test_optimizer_of_another_model_is_named() -> None:
    with pytest.raises(ValueError, match="SGD holds none of the model's parameters"):
        cf.apply_squeeze_excite(conv_norm_net(), 4, 8, SGD(conv_norm_net().parameters(), lr=0.1))


def test_remove_is_the_inverse_of_apply() -> None:
    model = conv_norm_net()
    optimizer = Adam([{"params": model[0].parameters()}, {"params": [p for m in model[1:] for p in m.parameters()]}])
    before = snapshot(model, optimizer)
    added = cf.apply_squeeze_excite(model, 4, 16, optimizer)
    train_step(model, optimizer)
    new = {parameter for wrapper in added.values() for parameter in wrapper.se.parameters()}
    assert new <= set(optimizer.state)
    bare = cf.remove_squeeze_excite(model, optimizer)
    after = snapshot(model, optimizer)
    assert before[:3] == after[:3]
    assert list(bare) == list(added)
    assert not new & set(optimizer.state)
    assert surgery.count_module_instances(model, SqueezeExciteConv2d) == 0
    train_step(model, optimizer)


def test_remove_works_when_another_algorithm_has_replaced_the_conv() -> None:
    blurpool = pytest.importorskip("composer.algorithms.blurpool")
    model = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16))
    cf.apply_squeeze_excite(model, 4, 16)
    blurpool.apply_blurpool(model)
    bare = cf.remove_squeeze_excite(model)
    assert list(bare) == ["0"]
    assert len(cf.apply_squeeze_excite(model, 4, 16)) == 1


def test_remove_of_a_lone_wrapper_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"Take model\.conv"):
        cf.remove_squeeze_excite(SqueezeExciteConv2d(3, 8, 3))
