"""The squeeze and the gate of Squeeze-and-Excitation, forward and backward.

For a conv output ``u`` of shape (N, C, H, W) and the excitation's logits ``z`` of shape (N, C), Squeeze-and-Excitation
(Hu et al., https://arxiv.org/abs/1709.01507, section 3) is

    p = mean of u over H, W        squeeze, equation 2
    s = sigmoid(z)                 gate, equation 3; z comes from p through a small MLP
    v = u * s                      scale, equation 4

Under plain autograd the product keeps ``u`` for its backward pass while the next layer keeps ``v``: one activation more
per SE layer than in the plain network. With ``g = dL/dv`` the gradients of the product are

    dL/du = g * s
    dL/dz = s (1 - s) * sum over H, W of g * u  =  (1 - s) * sum over H, W of g * v

so the backward pass can do with ``v``, which a following normalisation layer keeps anyway. ``v`` may then overwrite
``u`` and SE keeps no activation of its own: that is `gate_`. Where ``u`` has to stay, `gate` keeps ``u`` and gives the
same numbers. Both take unbatched maps, (C, H, W) with (C), as `torch.nn.Conv2d` does.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

__all__ = ["KERNEL_DTYPES", "gate", "gate_", "squeeze", "squeeze_excite_", "takes_kernels", "takes_plain_formula"]

_BLAS_DTYPES = (torch.float32, torch.float64)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _kernels_are_wanted() -> bool:
    setting = os.environ.get("COMPOSER_SE_TRITON", "0")
    if setting not in ("0", "1", ""):
        raise ValueError(f"COMPOSER_SE_TRITON is {setting!r}; set it to 1 for the Triton kernels on CUDA, 0 for none.")
    return setting == "1" and importlib.util.find_spec("triton") is not None


_KERNELS_ARE_WANTED = _kernels_are_wanted()

# The path is chosen by the next two functions and nowhere else.


def takes_plain_formula(u: Tensor) -> bool:
    """Whether ``u * sigmoid(z)`` has to be written with plain operators, which the surroundings take apart.

    Tracers (`torch.fx`, TorchScript, `torch.export`, ONNX) record operators, `torch.compile` fuses them, `torch.func`
    and forward-mode differentiation transform them; none gains from a custom backward pass. Tensor subclasses (fake
    tensors, DTensors, proxies) bring rules for the plain operators only.
    """
    # Asked in every layer: without Python frames around two of these flags, 3 us less of 130 at batch 1.
    return (
        type(u) is not Tensor
        or is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def takes_kernels(u: Tensor) -> bool:
    """Whether maps that don't take the plain formula go through the Triton kernels of `composer_se.triton_gate`.

    They do on CUDA devices, for dense maps in one of `KERNEL_DTYPES`, where Triton is installed and the environment had
    ``COMPOSER_SE_TRITON=1`` when this module was imported. The default is off: no kernel has been timed on a GPU yet.
    Views, such as the output of an unbatched conv, are left out because autograd lets no function of two results write
    into one.
    """
    return (
        _KERNELS_ARE_WANTED
        and u.is_cuda
        and u.dtype in KERNEL_DTYPES
        and (u.is_contiguous() or u.is_contiguous(memory_format=torch.channels_last))
        and not u._is_view()
    )


def squeeze(u: Tensor) -> Tensor:
    """The mean of every map of ``u``.

    Args:
        u: Conv output of shape (..., C, H, W).

    Returns:
        Tensor of shape (..., C) and of ``u``'s dtype, accumulated in float32 or wider.
    """
    if torch.is_grad_enabled() and u.requires_grad:
        return _Squeeze.apply(u)  # pyright: ignore[reportReturnType]
    return _mean(u)


def gate(u: Tensor, z: Tensor) -> Tensor:
    """Scales every map of ``u`` by its gate ``sigmoid(z)`` and leaves ``u`` as it is, keeping it for backward.

    Args:
        u: Conv output of shape (..., C, H, W).
        z: Logits of the gate, of shape (..., C).

    Returns:
        A new tensor of ``u``'s shape.
    """
    if torch.is_grad_enabled() and (u.requires_grad or z.requires_grad):
        return _Gate.apply(u, z)  # pyright: ignore[reportReturnType]
    return u * over_maps(torch.sigmoid(z))


def gate_(u: Tensor, z: Tensor, layer: str = "a SqueezeExciteConv2d") -> Tensor:
    """Scales every map of ``u`` by its gate ``sigmoid(z)`` in place, keeping the product for backward instead of ``u``.

    Two things are required of the surroundings: nobody else reads ``u`` afterwards, and, when gradients are recorded,
    the next layer does not change the result in place. A normalisation layer, which keeps its input, never does.

    Args:
        u: Conv output of shape (..., C, H, W). Overwritten.
        z: Logits of the gate, of shape (..., C).
        layer: Name of the layer, for the message of the error below.

    Returns:
        ``u``, scaled.

    Raises:
        RuntimeError: In the backward pass, when the result was changed in place after the forward pass.
    """
    if torch.is_grad_enabled() and (u.requires_grad or z.requires_grad):
        return _GateInPlace.apply(u, z, layer)  # pyright: ignore[reportReturnType]
    return u.mul_(over_maps(torch.sigmoid(z)))


def squeeze_excite_(u: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Scales every map of ``u`` by its gate ``sigmoid(w2 relu(w1 p))`` in place, without recording gradients.

    The whole block as operators: at batch 1 each of them, and each Python call around them, is a noticeable part of
    the time.

    Args:
        u: Conv output of shape (..., C, H, W). Overwritten.
        w1: Weight of the MLP's first layer, of shape (L, C).
        w2: Weight of its second layer, of shape (C, L).

    Returns:
        ``u``, scaled.
    """
    *batch, _, height, width = u.shape
    area = height * width
    if batch in ([], [1]) and _takes_blas(u, area):
        # One image: products with a vector, 20 us less per layer of a ResNet-50 than with a matrix of one row. What a
        # conv gives under autocast doesn't come here: the weights have another dtype, and only F.linear casts them.
        maps = u.view(-1, area)
        hidden = torch.mv(w1, torch.mv(maps, _averaging_vector(area, u.dtype))).relu_()
        maps.mul_(torch.mv(w2, hidden).sigmoid_().unsqueeze(1))
        return u
    hidden = F.linear(_mean(u), w1).relu_()
    return u.mul_(over_maps(F.linear(hidden, w2).sigmoid_()))


def _mean(u: Tensor) -> Tensor:
    *leading, height, width = u.shape
    area = height * width
    if _takes_blas(u, area):
        # One product with a vector in the place of a sum and a division: in a ResNet-50 at batch 1, where caches are
        # cold, 20 us less of 44 per layer.
        return torch.mv(u.view(-1, area), _averaging_vector(area, u.dtype)).view(leading)
    return u.mean((-2, -1))


def _takes_blas(u: Tensor, area: int) -> bool:
    # A fake tensor, which a dispatch mode may make of plain ones, would leave a fake averaging vector in the cache.
    return type(u) is Tensor and u.is_cpu and u.dtype in _BLAS_DTYPES and area > 0 and u.is_contiguous()


@functools.lru_cache(maxsize=64)
def _averaging_vector(size: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((size,), 1 / size, dtype=dtype, device="cpu")


class _Squeeze(torch.autograd.Function):
    """The mean over H and W with a gradient that is never materialised.

    PyTorch's own gradient of `mean` writes a full-size tensor. A stride-0 view is added to the gate's gradient in
    place: two full-size passes fewer per layer, and no overflow in float16, which `sum` divided by H*W would bring.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.map_shape = u.shape
        return _mean(u)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        height, width = ctx.map_shape[-2:]
        return over_maps(grad_outputs[0] / (height * width)).expand(ctx.map_shape)


class _Gate(torch.autograd.Function):
    """``v = u * sigmoid(z)``, saving ``u``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(u, z)
        return u * over_maps(torch.sigmoid(z))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, z = ctx.saved_tensors
        gates = torch.sigmoid(z)
        return _gate_backward(ctx.needs_input_grad, grad_outputs[0], u, gates, gates * (1 - gates))


class _GateInPlace(torch.autograd.Function):
    """``v = u * sigmoid(z)`` written over ``u``, saving ``v``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, z: Tensor, layer: str) -> Tensor:
        v = u.mul_(over_maps(torch.sigmoid(z)))
        ctx.mark_dirty(v)
        ctx.save_for_backward(v, z)
        ctx.layer = layer
        return v

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        v, z = saved_with_product(ctx)
        gates = torch.sigmoid(z)
        return *_gate_backward(ctx.needs_input_grad, grad_outputs[0], v, gates, 1 - gates), None


def saved_with_product(ctx: Any) -> tuple[Tensor, ...]:
    """What the gate of ``ctx.layer`` saved for backward, its product among it.

    Raises:
        RuntimeError: When the product was changed in place since; the message names the layer and the cure.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"The output of {ctx.layer} was changed in place after the forward pass, for instance by "
            "ReLU(inplace=True) or `out += shortcut`, and its gate needs it for backward. "
            "Apply Squeeze-and-Excitation with inplace=False."
        ) from error


def _gate_backward(
    needs_input_grad: tuple[bool, ...], g: Tensor, kept: Tensor, gates: Tensor, slope: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the product for ``u`` and ``z``, given ``dL/dz = slope * sum over H, W of g * kept``."""
    if torch.is_grad_enabled():
        # Double backward differentiates these lines, so they must not write into anything.
        return g * over_maps(gates), slope * (g * kept).sum((-2, -1))
    u_needs_grad, z_needs_grad = needs_input_grad[:2]
    scratch = torch.mul(kept, g) if z_needs_grad else None
    grad_z = None if scratch is None else slope * scratch.sum((-2, -1))
    if not u_needs_grad:
        return None, grad_z
    # The scratch tensor is written twice: on two CPU cores a second full-size allocation costs more in page faults
    # than the arithmetic (3.1 ms against 16 ms on 16x512x28x28).
    return torch.mul(g, over_maps(gates), out=scratch), grad_z


def over_maps(per_channel: Tensor) -> Tensor:
    """A view of (..., C) that broadcasts over maps (..., C, H, W)."""
    # One `view` where indexing with None takes two operators: 5 us less per layer at batch 1.
    return per_channel.view(*per_channel.shape, 1, 1)
