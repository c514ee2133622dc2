"""The output of a conv with SE before a norm is right for whoever reads it, in values and in gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import saved_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from composer_se import SqueezeExciteConv2d, apply_squeeze_excite, ops
from composer_se.pending_gate import PendingGate

CHANNELS = 8
SHAPES = {
    "several images": (4, 3, 9, 9),
    "one image": (1, 3, 9, 9),
    "one pixel": (4, 3, 3, 3),
    "no image": (0, 3, 9, 9),
}


class PlainConv2d(SqueezeExciteConv2d):
    """The same layer by the plain formula."""

    def forward(self, input: Tensor) -> Tensor:
        return self.se(self.conv(input))


class Cube(torch.autograd.Function):
    """A function of somebody's own: Python's dispatch does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grads[0]


class Rectify(torch.autograd.Function):
    """Changes its input where Python's dispatch does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return x.relu_()


Use = Callable[[nn.Module, nn.Module, Tensor], Any]


def two_readers(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    v = conv(x)
    return norm(v) + v


def read_without_gradients_first(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    v = conv(x)
    with torch.no_grad():
        v.mean()
    return norm(F.relu(v))


def norm_without_gradients_first(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    v = conv(x)
    with torch.no_grad():
        norm(v)
    return norm(v)


def changed_in_place_between_norms(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    v = conv(x)
    with torch.no_grad():
        norm(v)
    F.relu(v, inplace=True)
    return norm(v)


def norm_twice(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    v = conv(x)
    return norm(v) + 2 * norm(v)


def own_function_after_the_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    v = conv(x)
    y = norm(v)
    return y + Cube.apply(v)  # pyright: ignore[reportOperatorIssue]


def in_place_sum(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    y = norm(conv(x))
    y += y.detach()
    return y.relu_()


def retained_gradient(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    v = conv(x)
    v.retain_grad()
    y = norm(v)
    slope: Any = torch.autograd.grad(y.square().sum(), v, create_graph=True)[0]
    y.sum().backward(retain_graph=True)
    return slope * v + v.grad


def backward_twice(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    y = norm(conv(x))
    y.square().sum().backward(retain_graph=True)
    return y


def saved_through_hooks(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        return norm(conv(x))


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True) + x.sin()


def saved_elsewhere(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return norm(conv(x))


USES: dict[str, Callable[..., Any]] = {
    "norm": lambda conv, norm, x: norm(conv(x)),
    "no norm": lambda conv, norm, x: conv(x) * 2,
    "two readers": two_readers,
    "read without gradients first": read_without_gradients_first,
    "norm without gradients first": norm_without_gradients_first,
    "changed in place between norms": changed_in_place_between_norms,
    "norm twice": norm_twice,
    "own function": lambda conv, norm, x: norm(Cube.apply(conv(x))),
    "own function after the norm": own_function_after_the_norm,
    "in-place relu before": lambda conv, norm, x: norm(F.relu(conv(x), inplace=True)),
    "in-place sum after": in_place_sum,
    "chunks": lambda conv, norm, x: torch.cat([norm(t) for t in conv(x).chunk(2)]),
    "kept gradient": retained_gradient,
    "checkpoint around both": lambda conv, norm, x: checkpoint(lambda t: norm(conv(t)), x, use_reentrant=False),
    "checkpoint between": lambda conv, norm, x: norm(checkpoint(conv, x, use_reentrant=False)),
    "reentrant between": lambda conv, norm, x: norm(checkpoint(conv, x.requires_grad_(), use_reentrant=True)),
    "reentrant around both": lambda conv, norm, x: checkpoint(
        lambda t: norm(conv(t)), x.requires_grad_(), use_reentrant=True
    ),
    "numpy": lambda conv, norm, x: norm(conv(x)) * float(conv(x).detach().numpy().sum()),
    "deep copy of the values": lambda conv, norm, x: norm(conv(x)) + copy.deepcopy(conv(x).detach()),
    "script module": lambda conv, norm, x: norm(scripted(conv(x))),
    "saved tensors moved": saved_elsewhere,
    "saved tensors copied": saved_through_hooks,
    "backward twice": backward_twice,
    "layer norm": lambda conv, norm, x: norm(F.layer_norm(conv(x), (7, 7))) if x.shape[-1] == 9 else conv(x),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(CHANNELS),
    "batch, cumulative": lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
    "batch, bare": lambda: nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False),
    "batch, evaluation": lambda: nn.BatchNorm2d(CHANNELS).eval(),
    "batch, frozen": lambda: nn.BatchNorm2d(CHANNELS).requires_grad_(False),
    "group": lambda: nn.GroupNorm(2, CHANNELS),
    "instance": lambda: nn.InstanceNorm2d(CHANNELS),
    "instance, tracked": lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
    "instance, evaluation": lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True).eval(),
}


def register(kind: str, module: nn.Module) -> None:
    for part in module.modules():
        getattr(part, f"register_{kind}_hook")(lambda *_: None)


HOOKS: dict[str, Callable[[nn.Module], None]] = {
    "none": lambda module: None,
    "forward": lambda module: register("forward", module),
    "full backward": lambda module: register("full_backward", module),
}


def results(
    layer: type[SqueezeExciteConv2d],
    use: Use,
    norm: nn.Module,
    shape: tuple[int, ...] = SHAPES["several images"],
    prepare: Callable[[nn.Module], object] = lambda module: None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> list[Tensor] | str:
    """Output, gradients and buffers of one use; the error's first words if it fails."""
    torch.manual_seed(0)
    conv: Any = layer(3, CHANNELS, 3, latent_channels=4, followed_by_norm=True).double()
    norm = copy.deepcopy(norm).double()
    for buffer in norm.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer))
    modules = nn.ModuleList([conv, norm]).to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    for module in modules:
        prepare(module)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    try:
        y = use(conv, norm, x)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)).sum().backward()
    except (RuntimeError, ValueError, IndexError) as error:
        return str(error)[:40]
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in modules.parameters()]
    return [y.detach(), *gradients, *norm.buffers()]


def assert_same(mine: list[Tensor] | str, plain: list[Tensor] | str) -> None:
    if isinstance(mine, str) or isinstance(plain, str):
        assert mine == plain
        return
    for one, other in zip(mine, plain, strict=True):
        # Gradients that vanish but for rounding (a bias before a norm) are as large as their terms' rounding.
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("use", USES)
def test_every_use_is_that_of_the_plain_formula(use, hooks, memory_format) -> None:
    for kind in ("batch", "group", "instance"):
        options = {"prepare": HOOKS[hooks], "memory_format": memory_format}
        mine = results(SqueezeExciteConv2d, USES[use], NORMS[kind](), **options)
        plain = results(PlainConv2d, USES[use], NORMS[kind](), **options)
        assert_same(mine, plain)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", NORMS)
def test_every_norm_is_that_of_the_plain_formula(kind, shape) -> None:
    assert_same(
        results(SqueezeExciteConv2d, USES["norm"], NORMS[kind](), SHAPES[shape]),
        results(PlainConv2d, USES["norm"], NORMS[kind](), SHAPES[shape]),
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("use", ["norm", "two readers"])
def test_gradients_asked_for_in_parts_again_and_recorded_are_those_of_the_plain_formula(use, memory_format) -> None:
    def gradients(conv_class: type[SqueezeExciteConv2d]) -> list[Tensor]:
        torch.manual_seed(0)
        conv = conv_class(3, CHANNELS, 3, latent_channels=4, followed_by_norm=True)
        network = nn.ModuleList([conv, NORMS["batch"]()]).double().to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
        x = torch.randn(4, 3, 9, 9, dtype=torch.float64).contiguous(memory_format=memory_format)
        loss = USES[use](*network, x).pow(3).sum()
        se, everything = list(conv.se.parameters()), list(network.parameters())
        found: list[Tensor] = []
        for wanted in (se, everything, se, everything):
            found += torch.autograd.grad(loss, wanted, retain_graph=True)
        recorded = torch.autograd.grad(loss, everything, create_graph=True)
        found += torch.autograd.grad(sum(g.square().sum() for g in recorded), everything, retain_graph=True)
        return found + list(torch.autograd.grad(loss, everything))

    for mine, plain in zip(gradients(SqueezeExciteConv2d), gradients(PlainConv2d), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", ["conv", "se", "conv and se", "norm"])
def test_frozen_parts_get_no_gradient_and_the_others_theirs(frozen) -> None:
    def freeze(module: nn.Module) -> None:
        for part in frozen.split(" and "):
            target = module if part == "norm" else getattr(module, part, None)
            if target is not None and isinstance(module, nn.BatchNorm2d) == (part == "norm"):
                target.requires_grad_(False)

    assert_same(
        results(SqueezeExciteConv2d, USES["norm"], NORMS["batch"](), prepare=freeze),
        results(PlainConv2d, USES["norm"], NORMS["batch"](), prepare=freeze),
    )


def of_library(module: str, name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip(module), name)(*args, **options)


def ghost_batch_norm() -> nn.Module:
    ghost = pytest.importorskip("composer.algorithms.ghost_batchnorm.ghost_batchnorm")
    return ghost.GhostBatchNorm2d(nn.BatchNorm2d(CHANNELS), ghost_batch_size=2)


LIBRARY_NORMS: dict[str, Callable[[], nn.Module]] = {
    "torchvision's frozen batch norm": of_library("torchvision.ops", "FrozenBatchNorm2d", CHANNELS),
    "timm's batch norm with activation": of_library("timm.layers", "BatchNormAct2d", CHANNELS),
    "timm's, evaluation": lambda: of_library("timm.layers", "BatchNormAct2d", CHANNELS)().eval(),
    "Composer's ghost batch norm": ghost_batch_norm,
    "Composer's group norm": of_library(
        "composer.algorithms.low_precision_groupnorm.low_precision_groupnorm", "LPGroupNorm", 2, CHANNELS
    ),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("kind", LIBRARY_NORMS)
def test_norms_of_libraries_are_those_of_the_plain_formula(kind, memory_format) -> None:
    norm = LIBRARY_NORMS[kind]()
    mine = results(SqueezeExciteConv2d, USES["norm"], norm, memory_format=memory_format)
    assert not isinstance(mine, str), mine
    assert_same(mine, results(PlainConv2d, USES["norm"], norm, memory_format=memory_format))


@pytest.mark.parametrize("compiled", ["conv", "norm"])
def test_part_that_is_compiled_by_itself_works_with_the_other(compiled) -> None:
    def use(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
        torch.compiler.reset()
        if compiled == "conv":
            return nn.Sequential(torch.compile(conv, backend="aot_eager"), norm)(x)
        return nn.Sequential(conv, torch.compile(norm, backend="aot_eager"))(x)

    mine = results(SqueezeExciteConv2d, use, NORMS["batch"]())
    assert not isinstance(mine, str), mine
    assert_same(mine, results(PlainConv2d, USES["norm"], NORMS["batch"]()))


def layers() -> tuple[SqueezeExciteConv2d, nn.BatchNorm2d]:
    return SqueezeExciteConv2d(3, CHANNELS, 3, latent_channels=4, followed_by_norm=True), nn.BatchNorm2d(CHANNELS)


def test_output_is_pending_only_while_gradients_are_recorded() -> None:
    conv, _ = layers()
    x = torch.randn(2, 3, 9, 9)
    assert type(conv(x)) is PendingGate
    with torch.no_grad():
        assert type(conv(x)) is Tensor
    assert type(conv.requires_grad_(False)(x)) is Tensor
    conv.requires_grad_().followed_by_norm = False
    assert type(conv(x)) is Tensor


def test_shape_dtype_and_the_like_are_answered_without_making_the_product() -> None:
    conv, _ = layers()
    v: Any = conv(torch.randn(2, 3, 9, 9))
    assert (v.shape, v.dim(), v.ndim, len(v), v.numel(), v.size(1)) == ((2, 8, 7, 7), 4, 4, 2, 784, 8)
    assert (v.dtype, v.device.type, v.requires_grad, v.is_leaf) == (torch.float32, "cpu", True, False)
    assert v.product is None
    assert "grad_fn" in repr(v)
    assert v.product is not None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("kind", ["batch", "batch, evaluation", "group"])
def test_before_a_norm_no_map_is_kept_but_the_one_that_the_norm_keeps(kind, memory_format) -> None:
    x = torch.randn(8, 3, 34, 34).contiguous(memory_format=memory_format)
    conv, norm = layers()[0], NORMS[kind]()
    with_se = nn.Sequential(conv, norm).to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    plain = nn.Sequential(conv.conv, norm)
    map_bytes = 8 * CHANNELS * 32 * 32 * 4
    assert saved_bytes(with_se, x) - saved_bytes(plain, x) < map_bytes / 20


def test_map_is_overwritten_only_when_nobody_else_can_hold_it() -> None:
    conv, norm = layers()
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    expected = conv.conv(x).detach().clone()
    conv.conv.register_forward_hook(lambda module, args, u: seen.append(u))
    norm(conv(x)).sum().backward()
    torch.testing.assert_close(seen[0].detach(), expected)


@pytest.mark.parametrize("ask", ["retain_grad", "register_hook", "autograd.grad"])
def test_gradient_of_a_map_that_the_norm_took_is_refused_not_missing(ask) -> None:
    conv, norm = layers()
    v = conv(torch.randn(2, 3, 9, 9))
    loss = norm(v).square().sum()
    asking: dict[str, Callable[[], object]] = {
        "retain_grad": v.retain_grad,
        "register_hook": lambda: v.register_hook(lambda g: None),
        "autograd.grad": lambda: torch.autograd.grad(loss, [v], allow_unused=True),
    }
    with pytest.raises(RuntimeError, match="Ask before the norm runs"):
        asking[ask]()


def test_change_in_place_that_python_does_not_see_is_refused() -> None:
    @torch.jit.script
    def rectify(x: Tensor) -> Tensor:
        return x.relu_()

    conv, _ = layers()
    v = conv(torch.randn(2, 3, 9, 9))
    with pytest.raises(RuntimeError, match="relu_"):  # TorchScript drops the rest of the message
        rectify(v)
    with pytest.raises(RuntimeError, match=r"relu_.*call \.clone\(\) on the conv's output"):
        Rectify.apply(v)
    torch.testing.assert_close(rectify(v.clone()), F.relu(v))


def test_map_goes_when_the_backward_pass_is_over() -> None:
    import gc
    import weakref

    conv, norm = layers()
    gc.disable()  # a cycle would keep maps until some later collection
    try:
        v = conv(torch.randn(2, 3, 9, 9))
        u = weakref.ref(v.own.u)  # pyright: ignore[reportAttributeAccessIssue]
        loss = (norm(v) + Cube.apply(v)).sum()  # pyright: ignore[reportOperatorIssue]
        del v
        loss.backward()
        del loss
        assert u() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("order", ["surgery first", "conversion first"])
def test_synchronised_norms_get_the_same_blocks_before_surgery_and_after(order) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU())
    steps: list[Callable[[nn.Module], Any]] = [
        lambda model: apply_squeeze_excite(model, 4, 1),
        lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model),
    ]
    model = copy.deepcopy(plain)
    for step in steps if order == "surgery first" else steps[::-1]:
        torch.manual_seed(1)
        changed = step(model)
        model = changed if isinstance(changed, nn.Module) else model
    torch.manual_seed(1)
    apply_squeeze_excite(plain, 4, 1)
    assert isinstance(model[0], SqueezeExciteConv2d)
    assert isinstance(model[1], nn.SyncBatchNorm)
    images, found = torch.randn(4, 3, 9, 9), []
    for network in (model.eval(), plain.eval()):
        network(images).square().sum().backward()
        found.append([network(images).detach(), *(parameter.grad for parameter in network.parameters())])
    torch.testing.assert_close(found[0], found[1])


def test_norms_that_wait_for_other_processes_get_the_product() -> None:
    conv, norm = layers()
    images = torch.randn(4, 3, 9, 9)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(conv), copy.deepcopy(norm)))
    assert isinstance(synchronised[1], nn.SyncBatchNorm)
    torch.testing.assert_close(synchronised.eval()(images), nn.Sequential(conv, norm).eval()(images))


def test_double_backward_through_conv_gate_and_norm() -> None:
    found = []
    for layer in (SqueezeExciteConv2d, PlainConv2d):
        torch.manual_seed(0)
        conv = layer(3, CHANNELS, 3, latent_channels=4, followed_by_norm=True).double()
        norm = nn.BatchNorm2d(CHANNELS).double()
        x = torch.randn(4, 3, 9, 9, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(norm(conv(x)).pow(3).sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([x.grad, *(p.grad for p in (*conv.parameters(), *norm.parameters()))])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["batch", "batch, evaluation", "group", "instance"])
def test_autocast_gives_the_dtype_and_the_numbers_of_the_plain_formula(kind, dtype) -> None:
    found = []
    for layer in (SqueezeExciteConv2d, PlainConv2d):
        torch.manual_seed(0)
        conv, norm = layer(3, CHANNELS, 3, latent_channels=4, followed_by_norm=True), NORMS[kind]()
        with torch.autocast("cpu", dtype):
            y = norm(conv(torch.randn(4, 3, 12, 12)))
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        (y.float() * g).sum().backward()
        found.append([y, conv.weight.grad, *(p.grad for p in (*conv.se.parameters(), *norm.parameters()))])
    for mine, plain in zip(*found, strict=True):
        assert mine.dtype == plain.dtype
        # The gates' gradients vanish but for rounding before a norm of single maps.
        assert (mine - plain).float().norm() <= 0.05 * plain.float().norm() + 0.01


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_programs_over_the_output_are_those_of_the_plain_formula(data) -> None:
    """Each step reads tensors that are there and adds one; all of them enter the loss."""
    steps = data.draw(
        st.lists(st.tuples(st.sampled_from(sorted(PROGRAM)), st.integers(0, 5), st.integers(0, 5)), max_size=6)
    )
    memory_format = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    kind = data.draw(st.sampled_from(sorted(NORMS)))

    def program(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
        tensors = [conv(x)]
        for name, i, j in steps:
            tensors.append(PROGRAM[name](norm, tensors[i % len(tensors)], tensors[j % len(tensors)]))
        total = tensors[0] * 0
        for t in tensors:
            total = total + t.sin()
        return total

    mine = results(SqueezeExciteConv2d, program, NORMS[kind](), memory_format=memory_format)
    plain = results(PlainConv2d, program, NORMS[kind](), memory_format=memory_format)
    assert_same(mine, plain)


def without_gradient(norm: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        return norm(a) * b


PROGRAM: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "norm": lambda norm, a, b: norm(a),
    "functional norm": lambda norm, a, b: F.batch_norm(a, None, None, training=True),
    "group norm": lambda norm, a, b: F.group_norm(a, 4),
    "sum": lambda norm, a, b: a + b,
    "product": lambda norm, a, b: a * b.sigmoid(),
    "own function": lambda norm, a, b: Cube.apply(a.tanh()) + Cube.apply(b),  # pyright: ignore
    "own function first": lambda norm, a, b: Cube.apply(a) * 0.1,  # pyright: ignore
    "checkpoint": lambda norm, a, b: checkpoint(lambda t: t.tanh() * b, a, use_reentrant=False),
    "norm in checkpoint": lambda norm, a, b: checkpoint(
        lambda t: F.batch_norm(t, None, None, training=True), a, use_reentrant=False
    ),
    "without gradient": without_gradient,
    "detached": lambda norm, a, b: a.detach() + b,
    "chunks": lambda norm, a, b: torch.cat([norm(t) for t in a.chunk(2)]),
    "in place on a copy": lambda norm, a, b: a.clone().mul_(2).add_(b),
    "flipped": lambda norm, a, b: a.flip(2),
    "stacked": lambda norm, a, b: torch.stack([a, b]).mean(0),
}


def test_small_maps_are_gated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = SqueezeExciteConv2d(3, CHANNELS, 3, latent_channels=4, followed_by_norm=True).double()
    images = torch.randn(SHAPES["several images"]).double()
    numbers = conv.conv(images).numel()
    monkeypatch.setattr(ops, "MIN_NUMEL", numbers)
    pending = conv(images)
    assert type(pending) is PendingGate
    monkeypatch.setattr(ops, "MIN_NUMEL", numbers + 1)
    product = conv(images)
    assert type(product) is Tensor
    parameters = list(conv.parameters())
    expected = torch.autograd.grad(F.batch_norm(pending, None, None, training=True).relu().sum(), parameters)
    found = torch.autograd.grad(F.batch_norm(product, None, None, training=True).relu().sum(), parameters)
    torch.testing.assert_close(found, expected)
