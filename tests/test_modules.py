"""The block and the conv that carries it, against plain PyTorch and Composer's own block."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import plain_gate, plain_squeeze_excite, saved_bytes
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from composer_se import SqueezeExcite2d, SqueezeExciteConv2d

MAPS = torch.randn(2, 8, 6, 5)


def weights(block: SqueezeExcite2d) -> tuple[Tensor, Tensor]:
    fc1, fc2 = (module for module in block.modules() if isinstance(module, nn.Linear))
    return fc1.weight, fc2.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_block_is_the_formula_of_the_paper(dtype) -> None:
    block = SqueezeExcite2d(8, 3, dtype=dtype)
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


@pytest.mark.parametrize(("latent_channels", "error"), [(3.5, ValueError), ("64", TypeError)])
def test_wrong_hidden_width_is_refused(latent_channels, error) -> None:
    with pytest.raises(error, match="latent_channels is .*whole number >= 1"):
        SqueezeExcite2d(16, latent_channels)
    with pytest.raises(error, match="latent_channels is .*whole number >= 1"):
        SqueezeExciteConv2d(3, 16, 3, latent_channels=latent_channels)


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


def test_copy_of_a_wrapper_around_a_parametrised_conv_is_a_wrapper() -> None:
    layer = SqueezeExciteConv2d(3, 8, 3)
    parametrizations.weight_norm(layer.conv)  # gives the conv a __deepcopy__ of its own
    images = torch.randn(2, 3, 6, 6)
    assert torch.equal(copy.deepcopy(layer)(images), layer(images))


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
    """A conv with a block, and a norm or an addition after it."""

    def __init__(self, followed_by_norm: bool) -> None:
        super().__init__()
        self.layer = SqueezeExciteConv2d(3, 8, 3, bias=False, followed_by_norm=followed_by_norm)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        v = self.layer(images)
        return self.norm(v) if self.layer.followed_by_norm else v + 1


both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
with_and_without_gradients = pytest.mark.parametrize("record_gradients", [True, False])


@both_layouts
@pytest.mark.parametrize("before_norm", [True, False])
def test_block_keeps_no_map_before_a_norm_and_one_elsewhere(before_norm, layout) -> None:
    images = torch.randn(4, 3, 32, 32).to(memory_format=layout)
    with_se = Owner(before_norm).to(memory_format=layout)
    without = copy.deepcopy(with_se)
    without.layer = with_se.layer.conv
    without.layer.followed_by_norm = before_norm
    map_bytes = 4 * 8 * 30 * 30 * 4
    more = saved_bytes(with_se, images) - saved_bytes(without, images)
    assert more < map_bytes / 10 if before_norm else map_bytes <= more < 1.1 * map_bytes


class ConvOutputs(TorchDispatchMode):
    """Holds what convs return."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.convolution:
            self.held.append(out)
        return out


def overwrites(layer: SqueezeExciteConv2d) -> bool:
    """Whether a forward pass without gradients returns the memory of the conv's output."""
    with torch.no_grad(), ConvOutputs() as outputs:
        result = layer(MAPS)
    (output,) = outputs.held
    return result.data_ptr() == output.data_ptr()


@pytest.mark.parametrize("followed_by_norm", [True, False])
def test_without_gradients_the_output_of_the_conv_is_overwritten(followed_by_norm) -> None:
    layer = SqueezeExciteConv2d(8, 16, 3, followed_by_norm=followed_by_norm)
    assert overwrites(layer)
    assert overwrites(layer.eval())


def test_output_of_a_parametrised_conv_is_overwritten() -> None:
    assert overwrites(SqueezeExciteConv2d(conv=parametrizations.weight_norm(nn.Conv2d(8, 16, 3))))


def test_hooks_on_the_mlp_leave_the_output_of_the_conv_to_be_overwritten() -> None:
    layer = SqueezeExciteConv2d(8, 16, 3)
    layer.se.pool_and_mlp["4"].register_forward_hook(lambda module, args, out: None)
    assert overwrites(layer)


HOOKS = {
    "conv": lambda layer: layer.conv.register_forward_hook,
    "conv before": lambda layer: layer.conv.register_forward_pre_hook,
    "conv backward": lambda layer: layer.conv.register_full_backward_hook,
    "block": lambda layer: layer.se.register_forward_hook,
    "block before": lambda layer: layer.se.register_forward_pre_hook,
    "all modules": lambda layer: nn.modules.module.register_module_forward_hook,
    "all modules before": lambda layer: nn.modules.module.register_module_forward_pre_hook,
    "all modules backward": lambda layer: nn.modules.module.register_module_full_backward_hook,
}


@pytest.mark.parametrize("observed", HOOKS)
def test_output_of_the_conv_is_left_alone_while_a_hook_may_hold_it(observed) -> None:
    layer = SqueezeExciteConv2d(8, 16, 3)
    handle = HOOKS[observed](layer)(lambda *args: None)
    try:
        assert not overwrites(layer)
    finally:
        handle.remove()
    assert overwrites(layer)


@both_layouts
@with_and_without_gradients
@pytest.mark.parametrize("observed", ["conv", "block", "block before", "all modules"])
def test_what_a_hook_holds_stays_what_it_was(observed, record_gradients, layout) -> None:
    owner, seen = Owner(followed_by_norm=True).to(memory_format=layout), []
    images = torch.randn(2, 3, 8, 8).to(memory_format=layout)
    expected = owner.layer.conv(images).detach().clone()
    handle = HOOKS[observed](owner.layer)(lambda *args: seen.append(args))
    try:
        with torch.set_grad_enabled(record_gradients):
            loss = owner(images).sum()
        if record_gradients:
            loss.backward()
    finally:
        handle.remove()
    if observed.startswith("block"):
        ((_, (held,), *_),) = seen
    else:
        ((_, _, held),) = [args for args in seen if args[0] is owner.layer.conv]
    assert torch.equal(held, expected)


PARTS = ["", "conv", "se", "se.pool_and_mlp.2", "se.pool_and_mlp.4"]


@with_and_without_gradients
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hook_on_a_part_fires(part, kind, record_gradients) -> None:
    layer, seen = SqueezeExciteConv2d(8, 16, 3, followed_by_norm=True), []
    handle = getattr(layer.get_submodule(part), kind)(lambda *args: seen.append(args))
    with torch.set_grad_enabled(record_gradients):
        layer(MAPS)
        handle.remove()
        layer(MAPS)
    assert len(seen) == 1


def test_hook_on_all_modules_sees_every_part() -> None:
    layer, seen = SqueezeExciteConv2d(8, 16, 3), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    with torch.no_grad():
        layer(MAPS)
    handle.remove()
    assert set(seen) == {layer.get_submodule(part) for part in PARTS}


def test_what_a_hook_on_the_mlp_returns_replaces_the_logits() -> None:
    layer = SqueezeExciteConv2d(8, 16, 3)
    layer.se.pool_and_mlp["4"].register_forward_hook(lambda module, args, out: torch.full_like(out, 30))
    torch.testing.assert_close(layer(MAPS), layer.conv(MAPS))  # gates of 1


def test_hook_on_the_mlp_costs_no_activation_memory() -> None:
    owner = Owner(followed_by_norm=True)
    images = torch.randn(2, 3, 16, 16)
    before = saved_bytes(owner, images)
    owner.layer.se.pool_and_mlp["4"].register_forward_hook(lambda module, args, out: None)
    assert saved_bytes(owner, images) == before


@with_and_without_gradients
@pytest.mark.parametrize("part", PARTS)
def test_patched_forward_of_a_part_is_called(part, record_gradients) -> None:
    layer, called = SqueezeExciteConv2d(8, 16, 3), []
    module = layer.get_submodule(part)
    original = module.forward
    module.forward = lambda *args: called.append(args) or original(*args)
    with torch.set_grad_enabled(record_gradients):
        layer(MAPS)
    assert len(called) == 1


@with_and_without_gradients
def test_replaced_conv_and_layers_of_the_mlp_are_used(record_gradients) -> None:
    layer = SqueezeExciteConv2d(8, 16, 3, latent_channels=4)
    layer.conv = nn.Conv2d(8, 16, 1)
    fc1 = layer.se.pool_and_mlp["2"] = nn.Linear(16, 5)
    fc2 = layer.se.pool_and_mlp["4"] = nn.Linear(5, 16)
    with torch.set_grad_enabled(record_gradients):
        u = layer.conv(MAPS)
        expected = plain_gate(u, fc2(torch.relu(fc1(u.mean((2, 3))))))
        torch.testing.assert_close(layer(MAPS), expected)


class Halved(SqueezeExcite2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


@with_and_without_gradients
def test_forward_of_a_block_of_another_class_is_used(record_gradients) -> None:
    layer = SqueezeExciteConv2d(8, 16, 3, latent_channels=4)
    expected = layer(MAPS) / 2
    halved = Halved(16, 4)
    halved.load_state_dict(layer.se.state_dict())
    layer.se = halved
    with torch.set_grad_enabled(record_gradients):
        torch.testing.assert_close(layer(MAPS), expected)


@with_and_without_gradients
@pytest.mark.parametrize("part", ["conv", "se", "se.pool_and_mlp", "se.pool_and_mlp.2"])
def test_parts_can_be_wrapped_for_checkpointing(part, record_gradients) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    layer = SqueezeExciteConv2d(8, 16, 3)
    expected = layer(MAPS).detach()
    layer.set_submodule(part, checkpoint_wrapper.checkpoint_wrapper(layer.get_submodule(part)))
    with torch.set_grad_enabled(record_gradients):
        out = layer(MAPS)
    torch.testing.assert_close(out, expected, check_stride=False)
    if record_gradients:
        out.sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())


class KeepingConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        self.last = super().forward(input)
        return self.last


class SigmoidConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias).sigmoid()


@both_layouts
@with_and_without_gradients
@pytest.mark.parametrize("conv_class", [KeepingConv, SigmoidConv])
def test_output_of_an_unknown_conv_is_left_alone(conv_class, record_gradients, layout) -> None:
    conv = conv_class(8, 16, 3).to(memory_format=layout)
    layer = SqueezeExciteConv2d(conv=conv, followed_by_norm=True)
    assert not overwrites(layer)
    images = MAPS.to(memory_format=layout)
    with torch.set_grad_enabled(record_gradients):
        loss = nn.functional.batch_norm(layer(images), None, None, training=True).square().sum()
    if record_gradients:
        loss.backward()
    if conv_class is KeepingConv:
        assert torch.equal(conv.last, nn.Conv2d.forward(conv, images))


def test_output_of_a_conv_whose_forward_was_replaced_is_left_alone() -> None:
    layer = SqueezeExciteConv2d(8, 16, 3)
    layer.conv.forward = layer.conv.forward
    assert not overwrites(layer)


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


def test_whole_module_goes_through_torch_save() -> None:
    layer, buffer = SqueezeExciteConv2d(8, 16, 3), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(MAPS), layer(MAPS))


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


@with_and_without_gradients
@pytest.mark.parametrize("part", ["conv", "se.pool_and_mlp.2", "se.pool_and_mlp.4"])
def test_parametrised_weight_is_used(part, record_gradients) -> None:
    layer = SqueezeExciteConv2d(8, 16, 3, latent_channels=4)
    before = layer(MAPS).detach()
    nn.utils.parametrize.register_parametrization(layer.get_submodule(part), "weight", Twice())
    with torch.set_grad_enabled(record_gradients):
        expected = plain_squeeze_excite(layer.conv(MAPS), *weights(layer.se))
        torch.testing.assert_close(layer(MAPS), expected)
    assert not torch.allclose(expected, before)


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


@with_and_without_gradients
def test_weights_of_a_class_of_their_own_are_used_by_their_layers(record_gradients) -> None:
    layer = SqueezeExciteConv2d(8, 16, 3)
    expected = layer(MAPS)
    for part in layer.se.pool_and_mlp.values():
        part.weight = nn.Parameter(part.weight.detach().as_subclass(OwnRules))
    with torch.set_grad_enabled(record_gradients):
        torch.testing.assert_close(layer(MAPS).as_subclass(Tensor), expected)


def test_runs_on_fake_tensors_and_on_real_ones_again() -> None:
    layer, image = SqueezeExciteConv2d(8, 16, 1), torch.randn(1, 8, 11, 13)  # a size that no other test has
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(layer(image), FakeTensor)
        torch.testing.assert_close(layer(image), plain_squeeze_excite(layer.conv(image), *weights(layer.se)))
