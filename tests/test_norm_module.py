"""The block after the norm: the paper's order, in the passes of the norm."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import conv_norm_net
from torch import Tensor, nn

from composer_se import SqueezeExciteConv2d, SqueezeExciteNorm2d, apply_squeeze_excite, ops, remove_squeeze_excite
from composer_se.selection import following_norms

TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
C = 12


def plain(norm: nn.Module, se: Any, u: Tensor) -> Tensor:
    """Norm and block as the paper writes them."""
    x = norm(u)
    first, last = se.pool_and_mlp["2"].weight, se.pool_and_mlp["4"].weight
    gates = se.gate_limit * torch.sigmoid(torch.relu(x.mean((2, 3)) @ first.T) @ last.T)
    return x * gates[..., None, None]


def norm_in_mode(mode: str) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(
        C,
        affine=mode != "no weight",
        momentum=None if mode == "cumulative" else 0.1,
        track_running_stats=mode != "no statistics",
    )
    if norm.weight is not None:
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
    if mode in ("evaluation", "frozen"):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.eval().requires_grad_(mode == "evaluation")
    return norm


MODES = ("training", "evaluation", "frozen", "no statistics", "no weight", "cumulative")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("init", ["default", "identity"])
@pytest.mark.parametrize("mode", MODES)
def test_output_gradients_and_running_statistics_are_the_plain_formulas(mode: str, init: str, dtype: Any) -> None:
    norm = norm_in_mode(mode).to(dtype)
    wrapper = SqueezeExciteNorm2d(norm, C, 4, init=init, dtype=dtype)
    nn.init.normal_(wrapper.se.pool_and_mlp["4"].weight)
    reference = copy.deepcopy(wrapper)
    for step in range(2):
        torch.manual_seed(step)
        u = torch.randn(4, C, 5, 7, dtype=dtype, requires_grad=True)
        g = torch.randn(4, C, 5, 7, dtype=dtype)
        y, expected = wrapper(u * 1), plain(reference.norm, reference.se, u)
        assert type(y.grad_fn).__name__ == "_AffineBackward"
        torch.testing.assert_close(y, expected, **TOLERANCE[dtype])
        trained = [[u, *(p for p in module.parameters() if p.requires_grad)] for module in (wrapper, reference)]
        grads, expected_grads = (torch.autograd.grad(o, t, g) for o, t in zip((y, expected), trained, strict=True))
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, **TOLERANCE[dtype])
    for buffer, expected_buffer in zip(wrapper.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected_buffer, **TOLERANCE[dtype])


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_derivatives_pass_the_numerical_check(mode: str) -> None:
    wrapper = SqueezeExciteNorm2d(norm_in_mode(mode).double(), C, 3, dtype=torch.float64)
    u = torch.randn(2, C, 2, 2, dtype=torch.float64, requires_grad=True)

    def both(u: Tensor, first: Tensor, weight: Tensor) -> Tensor:
        parameters = {"se.pool_and_mlp.2.weight": first, "norm.weight": weight}
        return torch.func.functional_call(wrapper, parameters, (u,))

    inputs = (u, wrapper.se.pool_and_mlp["2"].weight, wrapper.norm.weight)
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)


def test_a_second_backward_after_a_recorded_one_is_right() -> None:
    wrapper = SqueezeExciteNorm2d(norm_in_mode("training").double(), C, 3, dtype=torch.float64)
    u = torch.randn(2, C, 3, 3, dtype=torch.float64, requires_grad=True)
    y, expected = wrapper(u * 1).square().sum(), plain(wrapper.norm, wrapper.se, u).square().sum()
    for _ in range(2):
        (recorded,) = torch.autograd.grad(y, u, create_graph=True)
        (again,) = torch.autograd.grad(y, u, retain_graph=True)
        (right,) = torch.autograd.grad(expected, u, retain_graph=True)
        torch.testing.assert_close(recorded, right)
        torch.testing.assert_close(again, right)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.GroupNorm(3, C),
        lambda: nn.InstanceNorm2d(C, affine=True),
        lambda: nn.LocalResponseNorm(3),
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(norm_in_mode("evaluation")).eval(),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_other_norms_layouts_and_evaluation_give_the_plain_formula(make: Callable[[], nn.Module], recorded) -> None:
    wrapper = SqueezeExciteNorm2d(make(), C, 4)
    u = torch.randn(2, C, 5, 5)
    with torch.set_grad_enabled(recorded):
        torch.testing.assert_close(wrapper(u), plain(wrapper.norm, wrapper.se, u))
    wrapper = SqueezeExciteNorm2d(norm_in_mode("evaluation"), C, 4)
    for maps in (u, u.to(memory_format=torch.channels_last), u[:1], u[:0], u[..., :1, :1]):
        with torch.set_grad_enabled(recorded):
            torch.testing.assert_close(wrapper(maps), plain(wrapper.norm, wrapper.se, maps))


class _Bottleneck(nn.Module):
    """The SE bottleneck of the paper, written out (figure 3 and table 1)."""

    def __init__(self, block: Any, width: int) -> None:
        super().__init__()
        self.block = block
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(block.conv3.out_channels, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, block.conv3.out_channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        out = block.relu(block.bn1(block.conv1(x)))
        out = block.relu(block.bn2(block.conv2(out)))
        out = block.bn3(block.conv3(out))
        out = out * self.se(out)[..., None, None]
        return block.relu(out + (x if block.downsample is None else block.downsample(x)))


def test_a_resnet50_is_the_papers_se_resnet50() -> None:
    models: Any = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = models.resnet50(num_classes=10).double()
    by_hand = copy.deepcopy(model)
    added: dict[str, Any] = apply_squeeze_excite(model, 16, 1, include="*.conv3", placement="norm")
    assert len(added) == 16
    assert all(name.endswith(".bn3") for name in added)
    for name, wrapper in added.items():
        stage, index, _ = name.split(".")
        block = _Bottleneck(by_hand.get_submodule(f"{stage}.{index}"), 16).double()
        block.se[2].load_state_dict(wrapper.se.pool_and_mlp["2"].state_dict())
        block.se[4].load_state_dict(wrapper.se.pool_and_mlp["4"].state_dict())
        by_hand.set_submodule(f"{stage}.{index}", block)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    out, expected = model(x), by_hand(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    # Both hold the same parameters, in another order.
    numbers = [sorted(p.grad.norm().item() for p in m.parameters() if p.grad is not None) for m in (model, by_hand)]
    torch.testing.assert_close(*map(torch.tensor, numbers))
    statistics = [sorted(b.double().norm().item() for b in m.buffers()) for m in (model, by_hand)]
    torch.testing.assert_close(*map(torch.tensor, statistics))
    torch.testing.assert_close(model.conv1.weight.grad, by_hand.conv1.weight.grad)
    for network in (model, by_hand):
        network.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(x))


def test_surgery_puts_blocks_after_norms_and_takes_them_out_again() -> None:
    model = conv_norm_net((8, 16))
    x = torch.randn(3, 3, 6, 6)
    expected, keys = model(x), list(model.state_dict())
    added = apply_squeeze_excite(model, 4, 16, placement="norm")
    assert list(added) == ["4"]
    assert isinstance(model[4], SqueezeExciteNorm2d)
    assert type(model[3]) is nn.Conv2d
    assert following_norms(model)[model[3]] is model[4]
    for placement in ("conv", "norm"):
        assert apply_squeeze_excite(model, 4, 16, placement=placement) == {}
    assert list(remove_squeeze_excite(model)) == ["4"]
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    assert list(apply_squeeze_excite(model, 4, 16)) == ["3"]
    assert isinstance(model[3], SqueezeExciteConv2d)


def test_blocks_join_the_group_of_the_conv_not_of_the_norm() -> None:
    model = conv_norm_net((8, 16))
    norms = [p for m in model if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    others = [p for m in model if not isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    named = [
        {"params": [(n, p) for n, p in model.named_parameters() if any(p is q for q in group)], "weight_decay": decay}
        for group, decay in ((norms, 0.0), (others, 0.1))
    ]
    optimizer = torch.optim.SGD(named, lr=0.1)  # pyright: ignore[reportArgumentType]
    apply_squeeze_excite(model, 4, 16, optimizer, placement="norm")
    with_norms, with_convs = optimizer.param_groups
    assert with_norms["params"] == norms
    assert with_convs["param_names"][-2:] == ["4.se.pool_and_mlp.2.weight", "4.se.pool_and_mlp.4.weight"]
    assert with_norms["param_names"][-2:] == ["4.norm.weight", "4.norm.bias"]


def test_convs_that_no_norm_follows_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    keys = list(model.state_dict())
    with pytest.raises(
        ValueError, match=r"no norm of maps follows 2 of the chosen convs \(2, 4\). Leave them out with exclude"
    ):
        apply_squeeze_excite(model, 4, 1, placement="norm")
    assert list(model.state_dict()) == keys
    assert list(apply_squeeze_excite(model, 4, 1, placement="norm", exclude=["2", "4"])) == ["1"]
    with pytest.raises(ValueError, match="placement is 'nrom'; choose \"conv\""):
        apply_squeeze_excite(model, 4, 1, placement="nrom")


def test_a_norm_of_channels_last_maps_is_not_taken_for_one_of_maps() -> None:
    class Block(nn.Module):  # ConvNeXt's
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm(8)

        def forward(self, input: Tensor) -> Tensor:
            return self.norm(self.conv(input).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    with pytest.raises(ValueError, match=r"no norm of maps follows 1 of the chosen convs \(0.conv\)"):
        apply_squeeze_excite(nn.Sequential(Block()), 4, 1, placement="norm")
    maps = torch.randn(2, 8, 8, 8)
    model = nn.Sequential(Block())
    expected = model(maps)
    apply_squeeze_excite(model, 4, 1, init="identity")
    assert torch.equal(model(maps), expected)


def test_plain_weights_load_and_copies_compute_the_same() -> None:
    plain_model = conv_norm_net()
    model = conv_norm_net()
    apply_squeeze_excite(model, 4, 1, placement="norm")
    missing, unexpected = model.load_state_dict(plain_model.state_dict(), strict=False)
    assert not unexpected
    assert all(".se." in name for name in missing)
    x = torch.randn(3, 3, 6, 6)
    expected = model.eval()(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)
    assert model[1].num_features == 8
    with pytest.raises(TypeError, match="weight belongs to the norm inside this SqueezeExciteNorm2d"):
        model[1].weight = nn.Parameter(torch.ones(8))


def test_training_keeps_the_maps_of_the_plain_network_and_no_more() -> None:
    kept = []
    for placement in (None, "norm"):
        model = conv_norm_net((16, 16))
        if placement:
            apply_squeeze_excite(model, 4, 1, placement=placement)
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(torch.randn(4, 3, 32, 32))
        kept.append(sum(storages.values()))
        del out
    assert kept[1] < 1.03 * kept[0]


@pytest.mark.parametrize("how", ["checkpoint", "compile", "export", "script", "vmap", "autocast"])
def test_surroundings_get_the_right_numbers(how: str) -> None:
    torch.manual_seed(0)
    model = conv_norm_net((8, 16))
    apply_squeeze_excite(model, 4, 1, placement="norm")
    reference = copy.deepcopy(model)
    x = torch.randn(4, 3, 6, 6)
    if how in ("export", "script", "vmap"):
        for network in (model, reference):
            network.eval()
    expected = reference(x)
    if how == "checkpoint":
        out = torch.utils.checkpoint.checkpoint_sequential(model, 2, x, use_reentrant=False)
    elif how == "compile":
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    elif how == "export":
        out = torch.export.export(model, (x,)).module()(x)
    elif how == "script":
        out = torch.jit.script(model)(x)
    elif how == "vmap":
        out = torch.func.vmap(lambda image: model(image[None])[0])(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
    tolerance = {"rtol": 0.1, "atol": 0.1} if how == "autocast" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.float(), expected, **tolerance)
    if how in ("checkpoint", "compile", "autocast"):
        out.float().square().sum().backward()
        expected.square().sum().backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.nn.functional.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.98


def test_small_maps_keep_pytorchs_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SqueezeExciteNorm2d(nn.BatchNorm2d(C), C, 4)
    u = torch.randn(2, C, 5, 5)
    monkeypatch.setattr(ops, "MIN_NUMEL", u.numel())
    assert "Affine" in type(layer(u).grad_fn).__name__
    monkeypatch.setattr(ops, "MIN_NUMEL", u.numel() + 1)
    assert "Mul" in type(layer(u).grad_fn).__name__
