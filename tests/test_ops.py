"""Squeeze, gate, and gate and norm together, against a few lines of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import plain_gate
from torch import Tensor, nn

from composer_se import ops

SHAPES = {
    "maps": (3, 4, 5, 7),
    "one pixel": (2, 4, 1, 1),
    "one sample": (1, 3, 4, 4),
    "empty batch": (0, 4, 3, 3),
    "unbatched": (4, 5, 6),
}
# Gradients are sums over H*W values in another order and association; half precisions round each product.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 6e-2},
    torch.float16: {"rtol": 4e-3, "atol": 8e-3},
}


LIMIT = 1.7  # of the gates; blocks have 1 or 2


def leaves(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    logits = torch.randn(shape[:-2], generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return maps, logits


def squeeze_and_gate(u: Tensor, z: Tensor) -> Tensor:
    """Both gradients of ``u`` together, as in a block: through the product and through the squeeze."""
    return ops.gate(u, z + ops.squeeze(u, ops.Link())[1].to(u.dtype), LIMIT)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gate_is_the_plain_formula(shape, dtype) -> None:
    u, z = leaves(shape, dtype)
    g = torch.randn(shape, dtype=torch.float64).to(dtype)
    out = squeeze_and_gate(u, z)
    grads = torch.autograd.grad(out, (u, z), g)

    expected = plain_gate(u, z + u.mean((-2, -1)), LIMIT)
    expected_grads = torch.autograd.grad(expected, (u, z), g)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, **TOLERANCE[dtype])


def test_gates_derivatives_pass_the_numerical_check() -> None:
    u, z = leaves((2, 3, 3, 2))
    assert torch.autograd.gradcheck(squeeze_and_gate, (u, z))
    assert torch.autograd.gradgradcheck(squeeze_and_gate, (u, z))


def test_gradient_of_the_squeeze_is_not_materialised() -> None:
    u, _ = leaves((2, 3, 8, 8))
    (grad,) = torch.autograd.grad(ops.squeeze(u, ops.Link())[1].sum(), u)
    assert grad.untyped_storage().nbytes() == 2 * 3 * grad.element_size()


def test_mean_of_a_large_float16_map_does_not_overflow() -> None:
    u = torch.full((1, 2, 256, 256), 8.0, dtype=torch.float16, requires_grad=True)  # the sum is 524,288
    _, p, _ = ops.squeeze(u, ops.Link())
    assert p.tolist() == [[8.0, 8.0]]
    p.sum().backward()
    assert u.grad is not None
    assert u.grad.isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0, 1e3, 1e5])
def test_variance_is_as_exact_as_its_input_however_far_the_mean(offset) -> None:
    u = torch.randn(3, 5, 28, 28) + offset * torch.randn(3, 5, 1, 1)
    u[0, 0] = 7.3  # constant
    exact = u.double().var((2, 3), correction=0)
    # The mean of float32 numbers of this size is known to within a few of their last digits.
    rounding = (u.abs().amax((2, 3)).double() * 2**-23) ** 2
    error = (ops.variance(u, ops.mean(u)).double() - exact).abs()
    assert (error <= 1e-5 * exact + rounding).all()


# Gate and norm together.


def conv_se_norm(u: Tensor, w1: Tensor, w2: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """The plain formula."""
    return norm(plain_gate(u, torch.relu(u.mean((2, 3)) @ w1.T) @ w2.T, LIMIT))


def fused(
    u: Tensor, w1: Tensor, w2: Tensor, weight: Tensor | None, bias: Tensor | None, norm: ops.Norm, again: bool = False
) -> Tensor:
    link = ops.Link()
    through, p, _ = ops.squeeze(u, link)
    z = torch.relu(p.to(u.dtype) @ w1.T) @ w2.T
    norm = replace(norm, weight=weight, bias=bias)
    through, taken = (u, None) if again else (through, link)
    return ops.gated_norm(through, u, p, z, LIMIT, norm, taken)


def running(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mean, var = torch.randn(8, generator=generator), torch.rand(8, generator=generator) + 0.5
    return mean.to(dtype), var.to(dtype)


EPS = 1e-3


def norm_of(groups: int | None, m: Tensor, v: Tensor, *, fixed: bool = False) -> ops.Norm:
    return ops.Norm(groups, EPS, None, None, m, v, 0.3, fixed)


NORMS: dict[str, tuple[Callable[..., ops.Norm], Callable[..., Tensor]]] = {
    "batch": (
        lambda m, v: norm_of(None, m, v),
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, True, 0.3, EPS),
    ),
    "batch, running statistics": (
        lambda m, v: norm_of(None, m, v, fixed=True),
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, False, 0.3, EPS),
    ),
    "group": (lambda m, v: ops.Norm(2, EPS), lambda x, m, v, w, b: F.group_norm(x, 2, w, b, EPS)),
    "instance": (
        lambda m, v: norm_of(8, m, v),
        lambda x, m, v, w, b: F.instance_norm(x, m, v, w, b, True, 0.3, EPS),
    ),
}
every_norm = pytest.mark.parametrize("kind", NORMS)


def inputs(dtype: torch.dtype, shape: tuple[int, ...] = (6, 8, 7, 9)) -> list[Tensor]:
    """u, w1, w2, weight and bias; the maps' means are as large as their deviations."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    u = numbers(*shape) + numbers(*shape[:2], 1, 1)
    return [t.to(dtype).requires_grad_() for t in (u, numbers(4, 8), numbers(8, 4), numbers(8), numbers(8))]


@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_norm
def test_gate_and_norm_together_are_the_plain_formula_to_rounding(kind, dtype, affine, again) -> None:
    make, plain = NORMS[kind]
    results = []
    for is_fused in (True, False):
        u, w1, w2, weight, bias = own = inputs(dtype)
        scale, stats = (weight, bias) if affine else (None, None), running(dtype)
        if is_fused:
            y = fused(u, w1, w2, *scale, make(*stats), again)
        else:
            y = conv_se_norm(u, w1, w2, lambda v, stats=stats, scale=scale: plain(v, *stats, *scale))
        trained = own if affine else own[:3]
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        results.append([y.detach(), *torch.autograd.grad(y, trained, g), *stats])
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    for mine, expected in zip(*results, strict=True):
        assert (mine - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype_of_norm", ["own", "float32"])
@every_norm
def test_gate_and_norm_together_in_reduced_precision(kind, dtype, dtype_of_norm) -> None:
    make, plain = NORMS[kind]
    u, w1, w2, weight, bias = inputs(dtype)
    exact = [t.detach().double().requires_grad_() for t in (u, w1, w2, weight, bias)]
    norms_dtype = dtype if dtype_of_norm == "own" else torch.float32
    weight, bias = (t.detach().to(norms_dtype).requires_grad_() for t in (weight, bias))
    y = fused(u, w1, w2, weight, bias, make(*running(norms_dtype)))
    stats = running(norms_dtype)
    expected = conv_se_norm(*exact[:3], lambda v: plain(v, *(t.double() for t in stats), *exact[3:]))
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, (u, w1, w2, weight, bias), g)
    expected_grads = torch.autograd.grad(expected, exact, g.double())
    assert y.dtype == dtype
    for mine, reference in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert (mine.double() - reference).norm() <= 0.03 * reference.norm()


@every_norm
def test_derivatives_of_gate_and_norm_pass_the_numerical_check(kind) -> None:
    make, _ = NORMS[kind]
    leaves = inputs(torch.float64, (3, 8, 2, 3))

    def function(*leaves: Tensor) -> Tensor:
        return fused(*leaves, make(*running(torch.float64)))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("trained", range(5), ids=["u", "w1", "w2", "weight", "bias"])
@every_norm
def test_gradient_of_one_input_alone(kind, trained) -> None:
    make, _ = NORMS[kind]
    leaves = inputs(torch.float64)
    y = fused(*leaves, make(*running(torch.float64)))
    expected = torch.autograd.grad(y.square().sum(), leaves)[trained]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == trained)
    y = fused(*leaves, make(*running(torch.float64)))
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves[trained])[0], expected)


@every_norm
def test_gradients_of_some_inputs_do_not_disturb_those_of_others(kind) -> None:
    leaves = inputs(torch.float64)
    loss = fused(*leaves, NORMS[kind][0](*running(torch.float64))).square().sum()
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    parts = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for leaf in leaves]
    torch.testing.assert_close(parts, list(expected))
    recorded = torch.autograd.grad(loss, leaves, create_graph=True)
    torch.testing.assert_close([t.detach() for t in recorded], list(expected))
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


@pytest.mark.parametrize("offset", [30.0, 1e3])
def test_maps_far_from_zero_and_constant_ones_give_what_batch_norm_gives(offset) -> None:
    u, w1, w2, weight, bias = inputs(torch.float32)
    with torch.no_grad():
        u[:, :4] += offset
        u[:, 7] = 3.0
        w1 /= offset
    stats = running(torch.float32)
    y = fused(u, w1, w2, weight, bias, norm_of(None, *stats))
    double = [t.detach().double() for t in (u, w1, w2, weight, bias)]
    exact_stats = tuple(t.double() for t in running(torch.float32))
    expected = conv_se_norm(*double[:3], lambda v: F.batch_norm(v, *exact_stats, *double[3:], True, 0.3, EPS))
    plain_stats = running(torch.float32)
    plain = conv_se_norm(u, w1, w2, lambda v: F.batch_norm(v, *plain_stats, weight, bias, True, 0.3, EPS))
    # Both round numbers of the size of the offset; ours may not round worse.
    error, plain_error = ((t.double() - expected).abs().max() for t in (y, plain))
    assert error <= 2 * plain_error + 1e-5
    torch.testing.assert_close([t.double() for t in stats], list(exact_stats), rtol=1e-4, atol=1e-4)


def test_maps_are_kept_once_and_no_product_is_written() -> None:
    leaves = inputs(torch.float32, (4, 8, 16, 16))
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fused(*leaves, NORMS["batch"][0](*running(torch.float32)))
    of_maps = [size for size in kept.values() if size >= leaves[0].nbytes]
    assert of_maps == [leaves[0].nbytes]
    assert y.untyped_storage().data_ptr() not in kept


def test_result_can_be_changed_in_place() -> None:
    leaves = inputs(torch.float64)
    y = fused(*leaves, ops.Norm(2, EPS)) * 1
    expected = torch.autograd.grad((y + 1).relu().sum(), leaves)
    y = fused(*leaves, ops.Norm(2, EPS))
    y += 1
    torch.testing.assert_close(torch.autograd.grad(y.relu_().sum(), leaves), expected)


UNFIT: dict[str, Callable[[], Tensor]] = {
    "channels_last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "one pixel": lambda: torch.randn(2, 3, 1, 1),
    "empty": lambda: torch.randn(0, 3, 4, 4),
    "unbatched": lambda: torch.randn(3, 4, 4),
    "integer": lambda: torch.ones(2, 3, 4, 4, dtype=torch.long),
    "on the meta device": lambda: torch.randn(2, 3, 4, 4, device="meta"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_maps_that_no_norm_can_take_along(kind) -> None:
    norm = ops.Norm(None, EPS)
    assert ops.takes_norm(torch.randn(2, 3, 4, 4), norm)
    assert not ops.takes_norm(UNFIT[kind](), norm)


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "numbers",
    [
        torch.ones(3, dtype=torch.float64),
        torch.ones(4),
        torch.ones(3, device="meta"),
        torch.ones(3).as_subclass(_Subclass),
    ],
    ids=["dtype", "shape", "device", "class"],
)
def test_norm_with_unusual_weights_is_left_to_pytorch(numbers: torch.Tensor) -> None:
    u = torch.randn(2, 3, 4, 4)
    assert ops.takes_norm(u, ops.Norm(None, EPS, torch.nn.Parameter(torch.ones(3))))
    assert ops.takes_norm(u.bfloat16(), ops.Norm(None, EPS, torch.ones(3), torch.ones(3, dtype=torch.bfloat16)))
    assert not ops.takes_norm(u, ops.Norm(None, EPS, torch.ones(3), numbers))


@pytest.mark.parametrize(
    "norm",
    [
        ops.Norm(2, EPS),
        ops.Norm(0, EPS),
        ops.Norm(-3, EPS),
        ops.Norm(None, EPS, running_mean=torch.zeros(3)),
        ops.Norm(None, EPS, fixed=True),
    ],
    ids=[
        "groups that do not divide the channels",
        "no group",
        "negative groups",
        "half of the statistics",
        "fixed without statistics",
    ],
)
def test_norm_that_pytorch_refuses_is_left_to_pytorch(norm: ops.Norm) -> None:
    assert not ops.takes_norm(torch.randn(2, 3, 4, 4), norm)


class Traced(nn.Module):
    """Records which path is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: list[bool] = []

    def forward(self, u: Tensor) -> Tensor:
        self.plain.append(ops.takes_plain_formula(u))
        return u * 2


def test_plain_formula_is_taken_where_operators_are_recorded_or_transformed() -> None:
    module: Any = Traced()
    u = torch.randn(2, 3, 4, 4)
    module(u)
    torch.fx.symbolic_trace(module)
    torch.jit.trace(module, u, check_trace=False)
    torch.func.vmap(module)(u)
    torch.func.jvp(module, (u,), (u,))
    with torch.autograd.forward_ad.dual_level():
        module(torch.autograd.forward_ad.make_dual(u, u))
    assert module.plain == [False, True, True, True, True, True]
