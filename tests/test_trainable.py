"""`train_only`: which parameters train, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from composer.models import ComposerClassifier
from helpers import conv_norm_net, saved_bytes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import composer_se
from composer_se.functional import apply_squeeze_excite, train_only

SE_OF_CONV_6 = ["6.se.pool_and_mlp.2.weight", "6.se.pool_and_mlp.4.weight"]
IMAGES, LABELS = torch.randn(8, 3, 8, 8), torch.arange(8) % 4


def network() -> nn.Sequential:
    """Convs 0, 3 and 6, of which the last has SE; batch norms 1, 4 and 7; the classifier 11."""
    model = conv_norm_net()
    apply_squeeze_excite(model, latent_channels=4, min_channels="auto")
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int = 3) -> None:
    for _ in range(number):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Any:
    modules = [(module.training, sorted(module.__dict__)) for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return copy.deepcopy((modules, flags, [optimizer.state_dict() for optimizer in optimizers]))


def test_the_same_weights_as_a_network_frozen_by_hand() -> None:
    model = network()
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    train_only(model, ["se", "head"], optimizer)
    steps(model.train(), optimizer)

    blocks_and_head = [by_hand[6].se, by_hand[11]]
    by_hand.requires_grad_(False)
    for module in blocks_and_head:
        module.requires_grad_(True)
    for module in by_hand.train():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    parameters = [parameter for parameter in by_hand.parameters() if parameter.requires_grad]
    steps(by_hand, torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01))

    expected = by_hand.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model[6].se.pool_and_mlp["4"].weight, network()[6].se.pool_and_mlp["4"].weight)
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["se"], SE_OF_CONV_6),
        (["head"], ["11.weight", "11.bias"]),
        ("norms", [f"{i}.{key}" for i in (1, 4, 7) for key in ("weight", "bias")]),
        (["6"], ["6.conv.weight", *SE_OF_CONV_6]),
        (["*.se.*", "1*.bias", "module.0"], ["0.weight", "1.bias", *SE_OF_CONV_6, "11.bias"]),
    ],
)
def test_patterns_choose_parameters(patterns: str | list[str], names: list[str]) -> None:
    model = network()
    assert list(train_only(model, patterns)) == names
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names
    wrapped = ComposerClassifier(network(), num_classes=4)
    assert list(train_only(wrapped, patterns)) == [f"module.{name}" for name in names]


def test_a_word_comes_before_a_module_of_that_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    assert list(train_only(Net(), "head")) == ["body.weight"]
    assert list(train_only(Net(), "head.*")) == ["head.weight"]


def test_a_frozen_norm_with_a_block_of_its_own_keeps_its_statistics() -> None:
    model = conv_norm_net()
    apply_squeeze_excite(model, latent_channels=4, min_channels="auto", placement="norm")
    train_only(model, "se")
    before = copy.deepcopy(model.state_dict())
    model.train()(IMAGES).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad.any() for parameter in model[7].se.parameters())
    assert "7.norm.weight" in train_only(model, "norms")
    assert model.train()[7].norm.training


@pytest.mark.parametrize(
    "name",
    [
        *("squeezenet1_1", "vit_b_32", "swin_t", "convnext_tiny", "densenet121"),
        *("timm/levit_128", "timm/caformer_s18", "timm/mobilenetv3_small_050"),
    ],
)
def test_head_is_the_classifier(name: str) -> None:
    with torch.device("meta"):
        if name.startswith("timm/"):
            model = timm.create_model(name.removeprefix("timm/"), num_classes=7)
            parts = model.get_classifier()
            expected = {p for part in (parts if isinstance(parts, tuple) else [parts]) for p in part.parameters()}
        else:
            model = torchvision.models.get_model(name, num_classes=7)
            expected = {parameter for parameter in model.parameters() if parameter.shape[0] == 7}
    if name == "squeezenet1_1":
        assert "classifier.1" in apply_squeeze_excite(model, min_channels=7, include="classifier.1")
    assert {*train_only(ComposerClassifier(model, num_classes=7), "head").values()} == expected


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, fullgraph=True, backend="eager")


@pytest.mark.parametrize("made", [as_it_is, copy.deepcopy, pickled, compiled])
def test_frozen_norms_stay_in_evaluation_mode(made: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    model(IMAGES)
    train_only(model, ["7", "head"])
    model = made(model)
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert [m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [False, False, mode]
        model(IMAGES)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.removeprefix("_orig_mod.") for name in changed} == {
        "7.running_mean",
        "7.running_var",
        "7.num_batches_tracked",
    }


def test_a_copy_is_released_by_itself() -> None:
    model = network()
    train_only(model, "head")
    other = copy.deepcopy(model)
    train_only(other, "*")
    assert other.train()[1].training
    assert not model.train()[1].training


def test_another_call_undoes_the_first() -> None:
    model = network()
    before = snapshot(model)
    train_only(model.eval(), ["head"])
    train_only(model.train(), "*")
    assert snapshot(model) == before
    train_only(model, ["head"])
    train_only(model.eval(), "norms")
    assert not any(module.training for module in model.modules())
    assert model.train()[1].training


def test_norms_without_parameters_follow_their_names() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.LazyLinear(2))

    for patterns, training in (("head", False), (["head", "1"], True), (["head", "norms"], True), ("*", True)):
        model = net()
        model(IMAGES)
        train_only(model, patterns)
        assert model.train()[1].training is training, patterns


def test_layers_around_a_frozen_norm_keep_their_mode() -> None:
    model = torchvision.ops.Conv2dNormActivation(3, 4, activation_layer=nn.Dropout, inplace=False)
    block = timm.layers.BatchNormAct2d(4, act_layer=nn.Dropout, inplace=False)
    model = nn.Sequential(model, block, nn.Flatten(), nn.Linear(4 * 64, 2)).train()
    train_only(model, "head")
    assert model.train()[0].training
    assert model[0][2].training
    assert not model[0][1].training
    assert not block.training
    assert block.act.training
    assert not any(module.training for module in model.eval().modules())
    assert "0.0.weight" not in train_only(model, "norms")


def test_gradients_after_a_frozen_norm_that_takes_the_gate_are_those_of_the_formula() -> None:
    model = network().double()
    images = IMAGES.double()
    model(images)
    train_only(model, ["6.se.*"])
    wrapper, norm = model[6], model[7]
    inputs = torch.randn(4, 16, 5, 5, dtype=torch.float64)
    norm(wrapper(inputs)).square().sum().backward()
    w1, w2 = wrapper.se.parameters()
    u = F.conv2d(inputs, wrapper.conv.weight, padding=1)
    v = u * torch.sigmoid(torch.relu(u.mean((2, 3)) @ w1.T) @ w2.T)[..., None, None]
    y = F.batch_norm(v, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False)
    for got, expected in zip((w1.grad, w2.grad), torch.autograd.grad(y.square().sum(), (w1, w2)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_step_keeps_less_memory() -> None:
    model = network().train()
    everything = saved_bytes(model, IMAGES)
    train_only(model, ["se", "head"])
    blocks_and_head = saved_bytes(model, IMAGES)
    train_only(model, ["head"])
    assert saved_bytes(model, IMAGES) < 0.1 * blocks_and_head < 0.1 * everything


def test_scripts() -> None:
    model = network()
    train_only(model, ["head"])
    scripted = torch.jit.script(model.eval())
    torch.testing.assert_close(scripted(IMAGES), model(IMAGES))


def test_optimizers_hold_exactly_the_parameters_that_train() -> None:
    model = network()
    convs, head = [model[0].weight, model[3].weight], [*model[11].parameters()]
    first = torch.optim.Adam([{"params": convs, "lr": 0.1}, {"params": head, "lr": 0.2}])
    second = torch.optim.SGD(
        [(f"net.{name}", p) for name, p in model.named_parameters() if name.startswith(("1.", "6."))],
        lr=0.3,
        momentum=0.9,
    )
    F.cross_entropy(model(IMAGES), LABELS).backward()
    for optimizer in (first, second):
        optimizer.step()
    kept = first.state[head[0]]
    train_only(model, ["0", "se", "head"], [first, second])
    assert [len(group["params"]) for group in first.param_groups] == [1, 2]
    assert first.param_groups[1]["params"] == head
    assert [group["lr"] for group in first.param_groups] == [0.1, 0.2]
    assert second.param_groups[0]["param_names"] == [f"net.{name}" for name in SE_OF_CONV_6]
    assert {*first.state, *second.state} == {p for p in model.parameters() if p.requires_grad}
    assert first.state[head[0]] is kept
    assert model[3].weight.grad is None

    trained = train_only(model, "norms", [second, first])  # the second has no group left to name them after
    assert second.param_groups[0]["params"] == list(trained.values())
    assert len(second.param_groups[0]["param_names"]) == 6
    assert not any(group["params"] for group in first.param_groups)
    train_only(model, "*", [second, first])
    assert {*second.param_groups[0]["params"]} == {*model.parameters()}


def test_parameters_that_join_get_their_names() -> None:
    model = network()
    optimizer = torch.optim.SGD([(f"net.{name}", p) for name, p in model.named_parameters()], lr=0.1)
    train_only(model, "head", optimizer)
    train_only(model, ["head", "se"], optimizer)
    assert optimizer.param_groups[0]["param_names"] == [f"net.{n}" for n in ("11.weight", "11.bias", *SE_OF_CONV_6)]


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        (["head", "8.se"], ValueError, r"^'8.se' matches no parameter of the model\. Nearest names: .*6\.se"),
        (["haed"], ValueError, r"Nearest names: head"),
        ([], ValueError, r"^Nothing would train"),
        (["head", 11], TypeError, r"patterns holds 11"),
        (11, TypeError, r"int"),
    ],
)
def test_wrong_patterns_change_nothing(patterns: Any, error: type[Exception], message: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps(model, optimizer, 1)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message) as caught:
        train_only(model, patterns, optimizer)
    assert "\n" not in str(caught.value)
    assert repr(snapshot(model, optimizer)) == repr(before)


def test_wrong_models_and_optimizers_are_refused() -> None:
    model = conv_norm_net()
    with pytest.raises(ValueError, match=r"^'se' stands for the Squeeze-and-Excitation blocks .* the model has none"):
        train_only(model, ["se", "head"])
    with pytest.raises(ValueError, match=r"'head' stands for the classifier"):
        train_only(nn.Sequential(nn.BatchNorm2d(3)), "head")
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        train_only(model, "head", torch.optim.SGD(conv_norm_net().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="holds a Sequential"):
        train_only(model, "head", [model])
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(TypeError, match="is wrapped in DistributedDataParallel"):
        train_only(wrapped, "head")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_exported() -> None:
    assert composer_se.train_only is composer_se.functional.train_only is train_only
