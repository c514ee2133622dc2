"""Checks of the Triton kernels, run by test_triton_kernels.py in a process of their own.

Triton decides at import whether its kernels are compiled or interpreted, and interpreting changes its language module
for good, so neither mode can share a process with other tests. Under TRITON_INTERPRET=1 the checks run on the CPU, else
on a GPU.
"""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from composer_se import SqueezeExcite2d, SqueezeExciteConv2d, ops, triton_gate
from composer_se import triton_kernels as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

gpu_only = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
every_dtype = pytest.mark.parametrize("dtype", ops.KERNEL_DTYPES, ids=str)
every_layout = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
both_ways = pytest.mark.parametrize("overwrite", [True, False], ids=["in place", "out of place"])
# The last three need several tiles for each map, and the last two several programs: (1, 1, 70, 74) in both layouts,
# (1, 5, 40, 33) in channels_last.
every_shape = pytest.mark.parametrize(
    "shape", [(2, 130, 1, 1), (3, 10, 7, 7), (2, 7, 5, 3), (1, 2, 56, 56), (1, 1, 70, 74), (1, 5, 40, 33)], ids=str
)
# The interpreter cuts bfloat16 off where the GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(17)


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Sends every map that does not take the plain formula through the kernels; the list names the launchers called."""
    called: list[str] = []

    def counted(name: str):
        launcher = getattr(kernels, name)

        def count(*args, **kwargs):
            called.append(name)
            return launcher(*args, **kwargs)

        return count

    for name in ("squeeze", "scale", "logits_grad"):
        monkeypatch.setattr(kernels, name, counted(name))
    monkeypatch.setattr(ops, "takes_kernels", lambda u: True)
    yield called
    assert called, "the kernels were not taken"


def maps(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=memory_format)


def logits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (2 * torch.randn(shape[:2], device=DEVICE)).to(dtype)


def assert_close(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Compares with a float64 reference, relative to its largest element."""
    assert actual is not None
    assert expected is not None
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected).abs().max()
        assert error <= tolerance * expected.abs().max(), f"off by {error:.2e}, largest {expected.abs().max():.2e}"


def over_maps(z: Tensor) -> Tensor:
    return z[..., None, None]


@every_dtype
@every_layout
@every_shape
def test_squeeze_is_the_mean_over_the_map(shape, memory_format, dtype):
    u = maps(shape, dtype, memory_format) + 1
    p = kernels.squeeze(u)
    assert p.dtype == dtype
    assert_close(p, u.double().mean((2, 3)), TOLERANCE[dtype])


def test_squeeze_of_float16_does_not_overflow_where_the_sum_does():
    u = torch.full((1, 2, 64, 64), 100.0, dtype=torch.float16, device=DEVICE)
    assert kernels.squeeze(u).tolist() == [[100.0, 100.0]]


@every_dtype
@every_layout
@every_shape
def test_scale_is_the_product_with_the_sigmoid(shape, memory_format, dtype):
    u, z = maps(shape, dtype, memory_format), logits(shape, dtype)
    expected = u.double() * over_maps(torch.sigmoid(z.double()))
    v = kernels.scale(u, z, out=torch.empty_like(u))
    assert v.stride() == u.stride()
    assert_close(v, expected, TOLERANCE[dtype])
    assert kernels.scale(u, z, out=u) is u
    assert torch.equal(u, v)


@every_dtype
@every_layout
@every_shape
def test_scale_adds_the_gradient_of_the_mean(shape, memory_format, dtype):
    g, z, grad_p = maps(shape, dtype, memory_format), logits(shape, dtype), logits(shape, dtype)
    means_grad = grad_p.double() / (shape[2] * shape[3])
    expected = g.double() * over_maps(torch.sigmoid(z.double())) + over_maps(means_grad)
    assert_close(kernels.scale(g, z, out=torch.empty_like(g), added=grad_p), expected, TOLERANCE[dtype])


@every_dtype
@every_layout
@every_shape
@pytest.mark.parametrize("kept_is_product", [True, False], ids=["v kept", "u kept"])
def test_logits_grad_is_the_gradient_of_the_product(shape, memory_format, dtype, kept_is_product):
    u, g = maps(shape, dtype, memory_format), maps(shape, dtype, memory_format)
    z = logits(shape, dtype)
    reference = z.double().requires_grad_()
    (expected,) = torch.autograd.grad(u.double() * over_maps(torch.sigmoid(reference)), reference, g.double())
    kept = (u.double() * over_maps(torch.sigmoid(z.double()))).to(dtype) if kept_is_product else u
    grad_z = kernels.logits_grad(g, kept, z, kept_is_product)
    assert grad_z.dtype == dtype
    assert_close(grad_z, expected, 2 * TOLERANCE[dtype])


def test_unbatched_maps_are_taken():
    u, z = torch.randn(10, 5, 3, device=DEVICE), torch.randn(10, device=DEVICE)
    assert_close(kernels.squeeze(u), u.double().mean((1, 2)), 1e-6)
    expected = u.double() * over_maps(torch.sigmoid(z.double()))
    assert_close(kernels.scale(u, z, out=u), expected, 1e-6)


@every_layout
@both_ways
def test_empty_batches_go_through_both_ways(memory_format, overwrite, kernels_everywhere):
    block = SqueezeExcite2d(6, 2, inplace=overwrite).to(DEVICE)
    x = maps((0, 6, 4, 4), torch.float32, memory_format).requires_grad_()
    out = block(x * 1)
    out.sum().backward()
    assert out.shape == x.shape
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for parameter in block.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_maps_that_the_kernels_do_not_take_are_refused():
    with pytest.raises(ValueError, match="float64"):
        triton_gate.squeeze_excite(torch.randn(1, 2, 3, 3, dtype=torch.float64, device=DEVICE), lambda p: p, False)
    with pytest.raises(ValueError, match=r"strides \(18, 1, 6, 2\)"):
        triton_gate.squeeze_excite(
            torch.randn(1, 3, 3, 2, device=DEVICE).permute(0, 3, 1, 2)[:, :, :, :2], lambda p: p, False
        )


def block_and_input(
    inplace: bool, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.contiguous_format
) -> tuple[SqueezeExcite2d, Tensor]:
    block = SqueezeExcite2d(10, 4, inplace=inplace).to(DEVICE, dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block, maps((3, 10, 5, 4), dtype, memory_format).requires_grad_()


def plainly(block: SqueezeExcite2d, x: Tensor) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The MLP, the input and the output of the plain formula in float64, for the same numbers."""
    mlp = copy.deepcopy(block.pool_and_mlp).double().requires_grad_()
    x = x.detach().double().requires_grad_()
    return mlp, x, x * over_maps(mlp(x))


@every_dtype
@every_layout
@both_ways
def test_the_block_and_its_gradients_agree_with_the_plain_formula(dtype, memory_format, overwrite, kernels_everywhere):
    block, x = block_and_input(overwrite, dtype, memory_format)
    mlp, plain_x, expected = plainly(block, x)
    out = block(x * 1)
    g = torch.randn_like(out)
    out.backward(g)
    expected.backward(g.double())
    # The excitation works in the maps' dtype, as it does without kernels.
    tolerance = 8 * TOLERANCE[dtype]
    assert_close(out, expected, tolerance)
    assert_close(x.grad, plain_x.grad, tolerance)
    for parameter, plain in zip(block.parameters(), mlp.parameters(), strict=True):
        assert_close(parameter.grad, plain.grad, tolerance)
    assert out.is_contiguous(memory_format=memory_format)
    assert kernels_everywhere == ["squeeze", "scale", "logits_grad", "scale"]


class FullSizeOperators(TorchDispatchMode):
    """Collects the operators that compute on whole maps."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.names = shape, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        computes = not func.is_view and name not in ("empty_like", "new_empty", "detach")
        if computes and any(isinstance(t, Tensor) and t.shape == self.shape for t in (out, *args)):
            self.names.add(name)
        return out


@both_ways
def test_nothing_but_the_four_kernels_touches_a_whole_map(overwrite, monkeypatch):
    block, x = block_and_input(overwrite)
    u = x * 1
    g = torch.randn_like(u)
    launched = []
    for kernel in ("_sum_kernel", "_scale_kernel"):
        # The interpreter copies tensors around; what it computes is checked above.
        monkeypatch.setattr(kernels, kernel, Recorder(kernel, launched))
    with FullSizeOperators(u.shape) as seen:
        out = triton_gate.squeeze_excite(u, block._excitation(), overwrite)
        torch.autograd.grad(out, [x, *block.parameters()], g)
    assert launched == ["_sum_kernel", "_scale_kernel", "_sum_kernel", "_scale_kernel"]
    assert seen.names == {"mul"}  # the gradient of `x * 1`


class Recorder:
    """Stands for a kernel and takes note of its launches."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append(self.name)


@both_ways
@pytest.mark.parametrize("layout", ["expanded", "other memory format", "strided"])
def test_gradients_of_any_layout_are_taken(layout, overwrite, kernels_everywhere):
    block, x = block_and_input(overwrite)
    mlp, plain_x, expected = plainly(block, x)
    g = {
        "expanded": lambda: torch.randn(3, 10, 1, 1, device=DEVICE).expand(x.shape),
        "other memory format": lambda: torch.randn_like(x).contiguous(memory_format=torch.channels_last),
        "strided": lambda: torch.randn(3, 10, 5, 8, device=DEVICE)[..., ::2],
    }[layout]()
    block(x * 1).backward(g)
    expected.backward(g.double())
    assert_close(x.grad, plain_x.grad, 1e-5)
    for parameter, plain in zip(block.parameters(), mlp.parameters(), strict=True):
        assert_close(parameter.grad, plain.grad, 1e-5)


@both_ways
@pytest.mark.parametrize("wanted", ["input", "weights", "last weight", "frozen input"])
def test_gradients_can_be_had_one_by_one(wanted, overwrite, kernels_everywhere):
    block, x = block_and_input(overwrite)
    mlp, plain_x, expected = plainly(block, x)
    w1, w2 = block.parameters()
    plain_w1, plain_w2 = mlp.parameters()
    x.requires_grad_(wanted != "frozen input")
    w1.requires_grad_(wanted in ("weights", "frozen input"))
    w2.requires_grad_(wanted != "input")
    out = block(x * 1)
    g = torch.randn_like(out)
    pairs = {
        "input": [(x, plain_x)],
        "weights": [(w1, plain_w1), (w2, plain_w2)],
        "last weight": [(w2, plain_w2)],
        "frozen input": [(w1, plain_w1), (w2, plain_w2)],
    }[wanted]
    found = torch.autograd.grad(out, [ours for ours, _ in pairs], g)
    reference = torch.autograd.grad(expected, [plain for _, plain in pairs], g.double())
    for grad, plain_grad in zip(found, reference, strict=True):
        assert_close(grad, plain_grad, 1e-5)


def test_the_excitation_can_be_differentiated_without_the_gate():
    x = torch.randn(2, 3, 4, 4, device=DEVICE, requires_grad=True)
    seen = []
    triton_gate.squeeze_excite(x * 1, lambda p: seen.append(p * p) or seen[0], overwrite=True)
    seen[0].sum().backward()
    assert_close(x.grad, (over_maps(x.detach().double().mean((2, 3))) * 2 / 16).expand(x.shape), 1e-5)


@both_ways
@pytest.mark.parametrize("create_graph", [True, False])
def test_gates_that_ignore_the_map_pass_its_gradient_on(create_graph, overwrite):
    x = torch.randn(2, 3, 4, 4, device=DEVICE, requires_grad=True)
    z = torch.randn(2, 3, device=DEVICE, requires_grad=True)
    out = triton_gate.squeeze_excite(x * 1, lambda p: z, overwrite)
    (grad_x,) = torch.autograd.grad(out.sum(), x, create_graph=create_graph)
    assert_close(grad_x, over_maps(torch.sigmoid(z.detach().double())).expand(x.shape), 1e-5)


@both_ways
def test_a_graph_can_be_gone_through_twice(overwrite, kernels_everywhere):
    block, x = block_and_input(overwrite)
    out = block(x * 1)
    g = torch.randn_like(out)
    (once,) = torch.autograd.grad(out, x, g, retain_graph=True)
    (differentiable,) = torch.autograd.grad(out, x, g, create_graph=True)
    (again,) = torch.autograd.grad(out, x, g)
    assert_close(again, once.double(), 1e-5)
    assert_close(differentiable, once.double(), 1e-5)


@both_ways
def test_second_derivatives_agree_with_the_plain_formula(overwrite, kernels_everywhere):
    block, x = block_and_input(overwrite)
    mlp, plain_x, expected = plainly(block, x)
    out = block(x * 1)
    g = torch.randn_like(out).requires_grad_()
    plain_g = g.detach().double().requires_grad_()

    def second(out: Tensor, g: Tensor, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(out, [x, *parameters], g, create_graph=True)
        penalty = sum(grad.square().sum() for grad in first) + out.square().sum()
        return torch.autograd.grad(penalty, [x, g, *parameters])

    found = second(out, g, x, list(block.parameters()))
    for grad, plain in zip(found, second(expected, plain_g, plain_x, list(mlp.parameters())), strict=True):
        assert_close(grad, plain, 1e-4)


@both_ways
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant, overwrite, kernels_everywhere):
    block, x = block_and_input(overwrite)
    g = torch.randn_like(x)
    expected = torch.autograd.grad(block(x * 1), [x, *block.parameters()], g)
    for tensor in (x, *block.parameters()):
        tensor.grad = None
    out = checkpoint(lambda x: block(x * 1), x, use_reentrant=reentrant)
    assert isinstance(out, Tensor)
    out.backward(g)
    for tensor, grad in zip((x, *block.parameters()), expected, strict=True):
        assert_close(tensor.grad, grad.double(), 1e-6)


@both_ways
def test_saved_tensors_may_come_back_in_another_layout(overwrite, kernels_everywhere):
    block, x = block_and_input(overwrite, memory_format=torch.channels_last)
    g = torch.randn_like(x)
    (expected,) = torch.autograd.grad(block(x * 1), x, g)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone().contiguous(), lambda t: t):
        out = block(x * 1)
    assert_close(torch.autograd.grad(out, x, g)[0], expected.double(), 1e-6)


@both_ways
def test_autocast_runs_the_excitation_in_its_own_dtype(overwrite, kernels_everywhere):
    block, x = block_and_input(overwrite)
    mlp, plain_x, expected = plainly(block, x)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = block(x.bfloat16())
        excite = block._excitation()
        assert excite is not None
        assert excite(x.bfloat16().mean((2, 3))).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    g = torch.randn_like(out)
    out.backward(g)
    expected.backward(g.double())
    assert_close(x.grad, plain_x.grad, 0.05)
    for parameter, plain in zip(block.parameters(), mlp.parameters(), strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert_close(parameter.grad, plain.grad, 0.05)


def test_float32_maps_under_autocast_stay_float32(kernels_everywhere):
    block, x = block_and_input(False)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = block(x * 1)
    assert out.dtype == torch.float32


def test_an_output_changed_in_place_is_named(kernels_everywhere):
    block, x = block_and_input(True)
    block.layer_name = "layer3.0.conv2"
    out = block(x * 1)
    out.relu_()
    with pytest.raises(RuntimeError, match=r"layer3\.0\.conv2 was changed in place .* inplace=False"):
        out.sum().backward()


def test_an_output_of_its_own_may_be_changed_in_place(kernels_everywhere):
    block, x = block_and_input(False)
    _, plain_x, expected = plainly(block, x)
    block(x * 1).relu_().sum().backward()
    expected.relu().sum().backward()
    assert_close(x.grad, plain_x.grad, 1e-5)


@both_ways
def test_hooks_on_the_excitation_see_and_change_it(overwrite, kernels_everywhere):
    block, x = block_and_input(overwrite)
    block.pool_and_mlp[4].register_forward_hook(lambda module, args, z: z - z)  # pyright: ignore[reportOperatorIssue]
    assert_close(block(x * 1), x.detach().double() / 2, 1e-6)


class Passenger:
    """A hook, which lives as long as the graph that it hangs on."""

    def __call__(self, grad: Tensor) -> None:
        pass


@pytest.mark.parametrize("wanted", ["input", "weights"])
@both_ways
def test_the_graph_is_freed_with_its_output(wanted, overwrite, kernels_everywhere):
    block, x = block_and_input(overwrite)
    gc.disable()
    try:
        u = x * 1
        graph = Passenger()
        u.register_hook(graph)
        alive = weakref.ref(graph)
        out = block(u)
        torch.autograd.grad(out.sum(), [x] if wanted == "input" else list(block.parameters()))
        del u, out, graph
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@every_layout
def test_a_conv_with_se_goes_through_the_kernels(memory_format, grad, kernels_everywhere):
    conv = SqueezeExciteConv2d(3, 10, 3, latent_channels=4, followed_by_norm=True, device=DEVICE)
    conv.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    x = maps((2, 3, 8, 9), torch.float32, memory_format)
    with torch.set_grad_enabled(grad):
        out = conv(x)
    u = conv.conv(x).detach().double()
    assert_close(out.detach(), u * over_maps(copy.deepcopy(conv.se.pool_and_mlp).double()(u)), 1e-5)


@every_layout
def test_equal_inputs_give_equal_bits(memory_format):
    u, g = maps((1, 5, 40, 33), torch.float32, memory_format), maps((1, 5, 40, 33), torch.float32, memory_format)
    z = logits(u.shape, torch.float32)
    assert torch.equal(kernels.squeeze(u), kernels.squeeze(u))
    assert torch.equal(kernels.logits_grad(g, u, z, False), kernels.logits_grad(g, u, z, False))


@gpu_only
@every_layout
def test_maps_beyond_two_to_the_31_elements(memory_format):
    u = torch.ones(2, 513, 2048, 1024, dtype=torch.float16, device=DEVICE).contiguous(memory_format=memory_format)
    z = torch.arange(2 * 513, device=DEVICE).view(2, 513).half() / 1026
    assert torch.equal(kernels.squeeze(u), torch.ones_like(z))
    kernels.scale(u, z, out=u)
    corners = u[:, :, -1, -1]
    torch.testing.assert_close(corners, torch.sigmoid(z.float()).half())


@gpu_only
def test_a_training_step_can_be_captured_in_a_cuda_graph(kernels_everywhere):
    block, x = block_and_input(True)
    g = torch.randn_like(x)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(block(x * 1), [x, *block.parameters()], g)

    expected = step()
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for grad, plain in zip(captured, expected, strict=True):
        assert_close(grad, plain.double(), 1e-5)
