"""The block and the conv that carries it, against plain PyTorch and Composer's own block."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import conv_norm_net, plain_squeeze_excite, saved_bytes
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from composer_se import SqueezeExcite2d, SqueezeExciteConv2d

MAPS = torch.randn(2, 8, 6, 5)


def weights(block: SqueezeExcite2d) -> tuple[Tensor, Tensor]:
    fc1, fc2 = (module for module in block.modules() if isinstance(module, nn.Linear))
    return fc1.weight, fc2.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", ["auto", False])
def test_block_is_the_formula_of_the_paper(dtype, inplace) -> None:
    block = SqueezeExcite2d(8, 3, inplace=inplace, dtype=dtype)
    u = MAPS.to(dtype).requires_grad_()
    w1, w2 = weights(block)
    out, expected = block(u), plain_squeeze_excite(u, w1, w2)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out, expected, **tolerance)
    g = torch.randn_like(out)
    grads = torch.autograd.grad(out, (u, w1, w2), g)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, (u, w1, w2), g), strict=True):
        torch.testing.assert_close(grad, expected_grad, **tolerance)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_conv_with_block_computes_what_composers_own_computes(mode) -> None:
    builtin_module = pytest.importorskip("composer.algorithms.squeeze_excite.squeeze_excite")
    ours = SqueezeExciteConv2d(8, 16, 3, latent_channels=0.25)
    theirs = builtin_module.SqueezeExciteConv2d(8, 16, 3, latent_channels=0.25)
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        getattr(layer, mode)()
    out, expected = ours(MAPS), theirs(MAPS)
    torch.testing.assert_close(out, expected)
    for result in (out, expected):
        result.square().sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_without_gradients_the_result_is_the_same() -> None:
    layer = SqueezeExciteConv2d(8, 16, 3)
    expected = layer(MAPS).detach()
    with torch.inference_mode():
        torch.testing.assert_close(layer(MAPS), expected)


@pytest.mark.parametrize(("latent_channels", "width"), [(5, 5), (64.0, 64), (0.25, 4), (0.01, 1), (1, 1)])
def test_hidden_width_is_absolute_or_a_share_that_is_never_nothing(latent_channels, width) -> None:
    block = SqueezeExcite2d(16, latent_channels)
    assert block.latent_channels == width
    assert [tuple(weight.shape) for weight in weights(block)] == [(width, 16), (16, width)]


@pytest.mark.parametrize("latent_channels", [0, -1, -0.5, 3.5, float("nan"), float("inf"), 0.0])
def test_hidden_width_out_of_range_is_refused(latent_channels) -> None:
    with pytest.raises(ValueError, match="latent_channels is .*whole number >= 1.*fraction"):
        SqueezeExcite2d(16, latent_channels)


@pytest.mark.parametrize("latent_channels", [True, "64", None, [64]])
def test_hidden_width_that_is_no_number_is_refused(latent_channels) -> None:
    with pytest.raises(TypeError, match="latent_channels is .* of type .*whole number >= 1"):
        SqueezeExcite2d(16, latent_channels)


@pytest.mark.parametrize("inplace", ["yes", None, 1])
def test_unknown_choice_of_place_is_refused(inplace) -> None:
    with pytest.raises(ValueError, match="inplace is .*auto"):
        SqueezeExcite2d(16, inplace=inplace)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_block_takes_dtype_device_and_mode_of_the_conv(dtype) -> None:
    conv = nn.Conv2d(3, 16, 3, dtype=dtype).eval()
    layer = SqueezeExciteConv2d(conv=conv, latent_channels=4)
    assert not layer.training
    assert not layer.se.training
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    meta = SqueezeExciteConv2d(conv=nn.Conv2d(3, 16, 3, device="meta"))
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_conv_with_block_reads_like_the_conv() -> None:
    conv = nn.Conv2d(4, 16, (3, 5), stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect")
    layer = SqueezeExciteConv2d(conv=conv)
    for name in ("weight", "bias", *nn.Conv2d.__constants__):
        assert getattr(layer, name) is getattr(conv, name)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


def test_conv_and_arguments_for_another_are_refused() -> None:
    with pytest.raises(TypeError, match="either conv or the arguments"):
        SqueezeExciteConv2d(3, 8, 3, conv=nn.Conv2d(3, 8, 3))


def test_channels_last_stays_channels_last() -> None:
    layer = SqueezeExciteConv2d(8, 16, 3, followed_by_norm=True).to(memory_format=torch.channels_last)
    images = MAPS.to(memory_format=torch.channels_last)
    out = layer(images)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, plain_squeeze_excite(layer.conv(images), *weights(layer.se)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_pickles_compute_the_same(copied) -> None:
    layer = SqueezeExciteConv2d(8, 16, 3, followed_by_norm=True)
    twin = copied(layer)
    assert torch.equal(twin(MAPS), layer(MAPS))
    assert twin.followed_by_norm


def test_state_dict_of_the_bare_conv_loads_and_leaves_the_block_alone() -> None:
    conv, layer = nn.Conv2d(8, 16, 3), SqueezeExciteConv2d(8, 16, 3)
    block_before = copy.deepcopy(layer.se.state_dict())
    incompatible = layer.load_state_dict(conv.state_dict(), strict=False)
    assert incompatible.unexpected_keys == []
    assert {key.split(".")[0] for key in incompatible.missing_keys} == {"se"}
    assert torch.equal(layer.weight, conv.weight)
    for name, value in layer.se.state_dict().items():
        assert torch.equal(value, block_before[name])
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(conv.state_dict())


def test_state_dict_of_a_parametrised_conv_loads() -> None:
    conv = parametrizations.weight_norm(nn.Conv2d(8, 16, 3))
    layer = SqueezeExciteConv2d(conv=parametrizations.weight_norm(nn.Conv2d(8, 16, 3)))
    assert layer.load_state_dict(conv.state_dict(), strict=False).unexpected_keys == []
    assert torch.equal(layer.conv.weight, conv.weight)


class Owner(nn.Module):
    """A conv with a block and a consumer of its output, with hooks to count calls."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = SqueezeExciteConv2d(3, 8, 3, bias=False, **options)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.layer(images))


def test_before_a_norm_the_block_adds_no_activation_memory() -> None:
    images = torch.randn(4, 3, 32, 32)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    map_bytes = 4 * 8 * 30 * 30 * 4
    baseline = saved_bytes(plain, images)
    in_place = saved_bytes(Owner(followed_by_norm=True), images)
    kept = saved_bytes(Owner(inplace=False), images)
    assert in_place - baseline < map_bytes / 10
    assert kept - baseline > map_bytes


@pytest.mark.parametrize("observe", ["conv", "conv backward", "block", "block before", "all modules", "sigmoid"])
def test_auto_never_overwrites_what_a_hook_may_hold(observe) -> None:
    owner, seen = Owner(followed_by_norm=True), []
    images = torch.randn(2, 3, 8, 8)
    expected = owner.layer.conv(images).detach().clone()

    def keep(*args: Any) -> None:
        seen.append(args)

    register = {
        "conv": owner.layer.conv.register_forward_hook,
        "conv backward": owner.layer.conv.register_full_backward_hook,
        "block": owner.layer.se.register_forward_hook,
        "block before": owner.layer.se.register_forward_pre_hook,
        "all modules": nn.modules.module.register_module_forward_hook,
        "sigmoid": owner.layer.se.pool_and_mlp[5].register_forward_hook,
    }[observe]
    handle = register(keep)
    try:
        owner(images).sum().backward()
        with torch.no_grad():
            owner(images)
    finally:
        handle.remove()
    assert seen
    if observe in ("conv", "all modules"):
        outputs = [args[2] for args in seen if args[0] is owner.layer.conv]
        assert len(outputs) == 2
        assert all(torch.equal(output, expected) for output in outputs)
    if observe in ("block", "block before"):
        assert all(torch.equal(args[1][0], expected) for args in seen)


def test_hook_on_a_layer_of_the_mlp_sees_it_run_and_memory_stays() -> None:
    owner, logits = Owner(followed_by_norm=True), []
    images = torch.randn(2, 3, 16, 16)
    before = saved_bytes(owner, images)
    owner.layer.se.pool_and_mlp[4].register_forward_hook(lambda module, args, out: logits.append(out))
    assert saved_bytes(owner, images) == before
    assert [tuple(z.shape) for z in logits] == [(2, 8)]


def test_replaced_parts_of_the_mlp_are_used() -> None:
    layer = SqueezeExciteConv2d(8, 16, 3, latent_channels=4)
    w1, w2 = weights(layer.se)
    layer.se.pool_and_mlp[3] = nn.SiLU()
    layer.se.pool_and_mlp[5] = nn.Hardsigmoid()
    u = layer.conv(MAPS)
    expected = u * nn.functional.hardsigmoid(nn.functional.silu(u.mean((2, 3)) @ w1.T) @ w2.T)[:, :, None, None]
    torch.testing.assert_close(layer(MAPS), expected)


def test_wrapped_mlp_runs_through_its_wrapper() -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    layer = SqueezeExciteConv2d(8, 16, 3)
    expected = layer(MAPS)
    layer.se.pool_and_mlp = checkpoint_wrapper.checkpoint_wrapper(layer.se.pool_and_mlp)
    torch.testing.assert_close(layer(MAPS), expected)


def test_hook_on_the_whole_mlp_fires() -> None:
    layer, seen = SqueezeExciteConv2d(8, 16, 3), []
    layer.se.pool_and_mlp.register_forward_hook(lambda module, args, out: seen.append(out))
    layer(MAPS)
    assert len(seen) == 1


def test_patched_forward_of_a_part_is_called() -> None:
    layer, called = SqueezeExciteConv2d(8, 16, 3), []
    fc1 = layer.se.pool_and_mlp[2]
    original = fc1.forward
    fc1.forward = lambda features: called.append(features) or original(features)
    layer(MAPS)
    assert len(called) == 1


def test_forward_can_be_patched_on_conv_and_wrapper_alike() -> None:
    layer, calls = SqueezeExciteConv2d(8, 16, 3), []

    def wrapped(name, forward):
        return lambda maps: calls.append(name) or forward(maps)

    for name, module in (("conv", layer.conv), ("layer", layer)):
        module.forward = wrapped(name, module.forward)
    layer(MAPS)
    assert calls == ["layer", "conv"]


class KeepingConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        self.last = super().forward(input)
        return self.last


class ReluConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias).sigmoid()


@pytest.mark.parametrize("conv_class", [KeepingConv, ReluConv])
def test_auto_never_overwrites_the_output_of_an_unknown_conv(conv_class) -> None:
    conv = conv_class(3, 8, 3)
    layer = SqueezeExciteConv2d(conv=conv, followed_by_norm=True)
    images = torch.randn(2, 3, 8, 8)
    nn.functional.batch_norm(layer(images), None, None, training=True).sum().backward()
    if conv_class is KeepingConv:
        assert torch.equal(conv.last, nn.Conv2d.forward(conv, images))
    with torch.no_grad():
        layer(images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("followed_by_norm", [True, False])
def test_autocast_gives_the_plain_formulas_gradients(dtype, followed_by_norm) -> None:
    owner = Owner(followed_by_norm=followed_by_norm)
    images = torch.randn(4, 3, 12, 12)
    with torch.autocast("cpu", dtype):
        out = owner.layer(images)
        expected = plain_squeeze_excite(owner.layer.conv(images), *weights(owner.layer.se))
    assert out.dtype == expected.dtype == dtype
    parameters = list(owner.layer.parameters())
    g = torch.randn_like(out)
    grads = torch.autograd.grad(out, parameters, g)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, parameters, g), strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected_grad, rtol=3e-2, atol=3e-1 if dtype == torch.bfloat16 else 4e-2)


def test_gradients_accumulate_over_microbatches() -> None:
    whole, parts = Owner(followed_by_norm=True).eval(), Owner(followed_by_norm=True).eval()
    parts.load_state_dict(whole.state_dict())
    images = torch.randn(6, 3, 8, 8)
    whole(images).sum().backward()
    for microbatch in images.split(2):
        parts(microbatch).sum().backward()
    for parameter, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_frozen_conv_and_input_without_gradient_train_the_block() -> None:
    owner = Owner(followed_by_norm=True)
    owner.layer.conv.requires_grad_(False)
    owner(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert owner.layer.conv.weight.grad is None
    assert all(parameter.grad is not None for parameter in owner.layer.se.parameters())


def test_empty_batch_runs_forward_and_backward() -> None:
    layer = SqueezeExciteConv2d(3, 8, 3, followed_by_norm=True)
    layer(torch.randn(0, 3, 8, 8)).sum().backward()
    assert layer.weight.grad is not None


def test_unbatched_image_gives_its_row_of_the_batch() -> None:
    layer, images = SqueezeExciteConv2d(3, 8, 3), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(layer(images[1]), layer(images)[1])


def test_wrong_order_of_layers_is_an_error_that_names_the_layer() -> None:
    net = conv_norm_net()
    net[0] = SqueezeExciteConv2d(conv=net[0], inplace=True)
    net[0].se.layer_name = "0"
    net[1] = nn.Identity()
    with pytest.raises(RuntimeError, match=r"output of 0 was changed in place.*inplace=False"):
        net(torch.randn(2, 3, 8, 8)).sum().backward()


def test_whole_module_goes_through_torch_save() -> None:
    layer, buffer = SqueezeExciteConv2d(8, 16, 3), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(MAPS), layer(MAPS))


@pytest.fixture
def called_before() -> SqueezeExciteConv2d:
    """A layer that has looked at its parts and found them untouched."""
    layer = SqueezeExciteConv2d(8, 16, 3, latent_channels=4).eval()
    with torch.no_grad():
        layer(MAPS[:1])
    return layer


class Operators(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images", [MAPS, MAPS[:1], MAPS[0], MAPS[:1, :, :3, :3]], ids=["2", "1", "unbatched", "1x1"])
def test_formula_of_the_paper_without_gradients(images, dtype) -> None:
    layer = SqueezeExciteConv2d(8, 16, 3, latent_channels=4, dtype=dtype)
    images = images.to(dtype)
    expected = plain_squeeze_excite(layer.conv(images), *weights(layer.se))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(layer(images), expected, **tolerance)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("record_gradients", [True, False])
def test_formula_of_the_paper_under_autocast(record_gradients, batch_size) -> None:
    layer, images = SqueezeExciteConv2d(8, 16, 3, latent_channels=4), MAPS[:batch_size]
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(record_gradients):
        expected = plain_squeeze_excite(layer.conv(images), *weights(layer.se))
        out = layer(images)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_one_image_without_gradients_takes_as_few_operators_as_can_be(called_before) -> None:
    image = MAPS[:1]
    with torch.no_grad(), Operators() as seen:
        called_before(image)
    assert seen.names == ["convolution", "view", "mv", "mv", "relu_", "mv", "sigmoid_", "unsqueeze", "mul_"]


@pytest.mark.parametrize("part", ["conv", "se", "se.pool_and_mlp", *(f"se.pool_and_mlp.{i}" for i in range(6))])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hook_registered_after_the_first_call_fires(part, kind, called_before) -> None:
    seen = []
    handle = getattr(called_before.get_submodule(part), kind)(lambda *args: seen.append(args))
    with torch.no_grad():
        called_before(MAPS[:1])
        handle.remove()
        called_before(MAPS[:1])
    assert len(seen) == 1


def test_hook_on_all_modules_registered_after_the_first_call_fires(called_before) -> None:
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    with torch.no_grad():
        called_before(MAPS[:1])
    handle.remove()
    assert {called_before.conv, called_before.se} < set(seen)


@pytest.mark.parametrize("part", ["conv", "se", "se.pool_and_mlp", *(f"se.pool_and_mlp.{i}" for i in range(6))])
def test_forward_patched_after_the_first_call_is_called(part, called_before) -> None:
    module, called = called_before.get_submodule(part), []
    original = module.forward
    module.forward = lambda *args: called.append(args) or original(*args)
    with torch.no_grad():
        called_before(MAPS[:1])
    assert len(called) == 1


def test_parts_replaced_after_the_first_call_are_used(called_before) -> None:
    image, (w1, w2) = MAPS[:1], weights(called_before.se)
    called_before.conv = nn.Conv2d(8, 16, 1)
    called_before.se.pool_and_mlp[3] = nn.SiLU()
    with torch.no_grad():
        u = called_before.conv(image)
        expected = u * torch.sigmoid(nn.functional.silu(u.mean((2, 3)) @ w1.T) @ w2.T)[:, :, None, None]
        torch.testing.assert_close(called_before(image), expected)


@pytest.mark.parametrize("index", [2, 4])
def test_bias_of_a_replaced_layer_is_used(index, called_before) -> None:
    old = called_before.se.pool_and_mlp[index]
    called_before.se.pool_and_mlp[index] = nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        u = called_before.conv(MAPS[:1])
        expected = u * called_before.se.pool_and_mlp(u)[:, :, None, None]
        torch.testing.assert_close(called_before(MAPS[:1]), expected)


def test_bias_of_the_conv_parametrised_after_the_first_call_is_used(called_before) -> None:
    nn.utils.parametrize.register_parametrization(called_before.conv, "bias", Twice())
    with torch.no_grad():
        expected = plain_squeeze_excite(called_before.conv(MAPS[:1]), *weights(called_before.se))
        torch.testing.assert_close(called_before(MAPS[:1]), expected)


def test_weight_parametrised_after_the_first_call_is_used(called_before) -> None:
    image = MAPS[:1]
    for part in (called_before.conv, called_before.se.pool_and_mlp[2], called_before.se.pool_and_mlp[4]):
        nn.utils.parametrize.register_parametrization(part, "weight", Twice())
    with torch.no_grad():
        expected = plain_squeeze_excite(called_before.conv(image), *weights(called_before.se))
        torch.testing.assert_close(called_before(image), expected)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class OwnRules(Tensor):
    """A weight as quantisation libraries make them: it knows how to be used by `linear`, and nothing else."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.mv, torch.mm):
            raise NotImplementedError(f"{func}")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_of_a_class_of_their_own_are_used_by_their_layers(called_before) -> None:
    with torch.no_grad():
        expected = called_before(MAPS[:1])
        for part in (called_before.se.pool_and_mlp[2], called_before.se.pool_and_mlp[4]):
            part.weight = nn.Parameter(part.weight.detach().as_subclass(OwnRules))
        torch.testing.assert_close(called_before(MAPS[:1]).as_subclass(Tensor), expected)


def test_out_of_place_leaves_the_output_of_the_conv(called_before) -> None:
    called_before.se.inplace = False
    with torch.no_grad(), Operators() as seen:
        called_before(MAPS[:1])
    assert "mul" in seen.names
    assert "mul_" not in seen.names


def test_run_on_fake_tensors_leaves_nothing_fake_behind() -> None:
    layer, image = SqueezeExciteConv2d(8, 16, 1), torch.randn(1, 8, 11, 13)  # a size that no other test has
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(layer(image), FakeTensor)
        torch.testing.assert_close(layer(image), plain_squeeze_excite(layer.conv(image), *weights(layer.se)))


FIRED: list[nn.Module] = []


def note(module: nn.Module, args: Any, out: Any) -> None:
    FIRED.append(module)


def test_unpickled_layer_looks_for_its_hooks_anew(called_before, monkeypatch) -> None:
    count = RemovableHandle.next_id
    called_before.se.register_forward_hook(note)
    pickled = pickle.dumps(called_before)
    monkeypatch.setattr(RemovableHandle, "next_id", count)  # as it may be in another process
    twin = pickle.loads(pickled)
    with torch.no_grad():
        twin(MAPS[:1])
    assert len(FIRED) == 1
    assert FIRED[0] is twin.se
