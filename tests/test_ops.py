"""The squeeze and the gate against a few lines of plain PyTorch."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import plain_gate
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

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


def leaves(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    logits = torch.randn(shape[:-2], generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return maps, logits


def gate_in_place(u: Tensor, z: Tensor) -> Tensor:
    """`ops.gate_` on a copy, since a leaf that requires grad can't be overwritten."""
    return ops.gate_(u.clone(), z)


def squeeze_and_gate(gate, u: Tensor, z: Tensor) -> Tensor:
    """Both gradients of ``u`` together, as in a block: through the product and through the squeeze."""
    u = u.clone()
    return gate(u, z + ops.squeeze(u))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gate", [ops.gate, ops.gate_], ids=["kept", "in place"])
def test_value_and_gradients_are_those_of_the_plain_formula(gate, shape, dtype) -> None:
    u, z = leaves(shape, dtype)
    g = torch.randn(shape, dtype=torch.float64).to(dtype)
    out = squeeze_and_gate(gate, u, z)
    grads = torch.autograd.grad(out, (u, z), g)

    expected = plain_gate(u, z + u.mean((-2, -1)))
    expected_grads = torch.autograd.grad(expected, (u, z), g)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, **TOLERANCE[dtype])


@pytest.mark.parametrize("gate", [ops.gate, gate_in_place], ids=["kept", "in place"])
def test_first_and_second_derivatives_pass_the_numerical_check(gate) -> None:
    u, z = leaves((2, 3, 3, 2))
    function = functools.partial(squeeze_and_gate, gate)
    assert torch.autograd.gradcheck(function, (u, z))
    assert torch.autograd.gradgradcheck(function, (u, z))


@pytest.mark.parametrize("gate", [ops.gate, gate_in_place], ids=["kept", "in place"])
@pytest.mark.parametrize("frozen", ["maps", "logits"])
def test_gradient_of_one_side_alone(gate, frozen) -> None:
    u, z = leaves((2, 3, 4, 4))
    fixed, free = (u, z) if frozen == "maps" else (z, u)
    fixed.requires_grad_(False)
    grad = torch.autograd.grad(gate(u, z).square().sum(), free)[0]
    expected = torch.autograd.grad(plain_gate(u, z).square().sum(), free)[0]
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("gate", [ops.gate, gate_in_place], ids=["kept", "in place"])
def test_backward_twice_through_a_retained_graph(gate) -> None:
    u, z = leaves((2, 3, 4, 4))
    out = gate(u, z)
    first = torch.autograd.grad(out.sum(), (u, z), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (u, z))
    torch.testing.assert_close(first, second)


def test_gradient_has_the_memory_format_of_the_maps() -> None:
    u, z = leaves((2, 8, 5, 5))
    u = u.detach().to(memory_format=torch.channels_last).requires_grad_()
    out = ops.gate(u, z)
    (grad,) = torch.autograd.grad(out.square().sum(), u)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("record_gradients", [True, False])
def test_in_place_gate_returns_the_memory_it_was_given(record_gradients) -> None:
    u, z = leaves((2, 3, 4, 4))
    with torch.set_grad_enabled(record_gradients):
        maps = u.clone()
        expected = plain_gate(maps, z).detach()
        out = ops.gate_(maps, z)
    assert out.data_ptr() == maps.data_ptr()
    torch.testing.assert_close(out.detach(), expected)


def test_kept_gate_leaves_the_maps_as_they_are() -> None:
    u, z = leaves((2, 3, 4, 4))
    before = u.detach().clone()
    with torch.no_grad():
        ops.gate(u, z)
    ops.gate(u, z)
    assert torch.equal(u, before)


def test_kept_gate_allows_the_next_layer_to_work_in_place() -> None:
    u, z = leaves((2, 3, 4, 4))
    grad = torch.autograd.grad(ops.gate(u, z).relu_().sum(), u)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(plain_gate(u, z).relu().sum(), u)[0])


def test_change_after_the_in_place_gate_is_an_error_that_names_layer_and_cure() -> None:
    u, z = leaves((2, 3, 4, 4))
    out = ops.gate_(u.clone(), z, "layer1.0.conv2").relu_()
    with pytest.raises(RuntimeError, match=r"layer1\.0\.conv2 was changed in place.*inplace=False"):
        out.sum().backward()


def test_in_place_gate_keeps_nothing_but_its_result() -> None:
    u, z = leaves((4, 8, 16, 16))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.gate_(u.clone(), z)
    maps = [tensor for tensor in kept if tensor.numel() == u.numel()]
    assert [tensor.data_ptr() for tensor in maps] == [out.data_ptr()]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant) -> None:
    u, z = leaves((2, 3, 4, 4))
    block = functools.partial(squeeze_and_gate, ops.gate_)
    out = checkpoint(block, u, z, use_reentrant=use_reentrant)
    assert isinstance(out, Tensor)
    grads = torch.autograd.grad(block(u, z).square().sum(), (u, z))
    out.square().sum().backward()
    assert u.grad is not None
    torch.testing.assert_close((u.grad, z.grad), grads)


def test_saved_tensors_may_be_moved_away() -> None:
    u, z = leaves((2, 3, 4, 4))
    with save_on_cpu():
        out = squeeze_and_gate(ops.gate_, u, z)
    grads = torch.autograd.grad(out.square().sum(), (u, z))
    expected = plain_gate(u, z + u.mean((-2, -1))).square().sum()
    torch.testing.assert_close(grads, torch.autograd.grad(expected, (u, z)))


def test_squeeze_of_a_large_float16_map_does_not_overflow() -> None:
    u = torch.full((1, 2, 256, 256), 8.0, dtype=torch.float16, requires_grad=True)  # the sum is 524,288
    squeezed = ops.squeeze(u)
    assert squeezed.tolist() == [[8.0, 8.0]]
    squeezed.sum().backward()
    assert u.grad is not None
    assert torch.isfinite(u.grad).all()


def test_gradient_of_the_squeeze_is_not_materialised() -> None:
    u, _ = leaves((2, 3, 8, 8))
    (grad,) = torch.autograd.grad(ops.squeeze(u).sum(), u)
    assert grad.untyped_storage().nbytes() == 2 * 3 * grad.element_size()


class Traced(nn.Module):
    """Records which path is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: list[bool] = []

    def forward(self, u: Tensor) -> Tensor:
        self.plain.append(ops.takes_plain_formula(u))
        return u * 2


def test_plain_formula_is_taken_where_operators_are_recorded_or_transformed() -> None:
    module, u = Traced(), torch.randn(2, 3, 4, 4)
    module(u)
    torch.fx.symbolic_trace(module)
    torch.jit.trace(module, u, check_trace=False)
    torch.func.vmap(module)(u)
    torch.func.jvp(module, (u,), (u,))
    with torch.autograd.forward_ad.dual_level():
        module(torch.autograd.forward_ad.make_dual(u, u))
    assert module.plain == [False, True, True, True, True, True]
