"""Squeeze-and-Excitation with Triton kernels: seven full-size passes for a training step, where `ops` takes eleven.

Forward reads the map for the squeeze and reads and writes it for the scale; backward reads two tensors for the
gradient of the logits and reads and writes one for the map's. The last pass adds the gradient that comes through the
squeeze while it writes. Ordinary autograd cannot: the gate's gradient for the map is due before the excitation's
backward pass, the squeeze's after it, and both are full-size. So the map passes *through* the squeeze to the gate,

    u -> squeeze -> u -----------------> gate -> v
                 -> p -> excitation -> z ->

and on the way back the gate hands ``g = dL/dv`` on as it is, with ``z`` beside it, and the squeeze, which has ``dL/dp``
by then, writes ``g * sigmoid(z) + dL/dp / (H * W)``. The excitation stays ordinary operators under ordinary autograd:
its matrix products are the vendor library's, and autocast, hooks and wrapped weights need no care here.

Off unless the environment has ``COMPOSER_SE_TRITON=1``: see `composer_se.ops.takes_kernels`. Calling `squeeze_excite`
takes the kernels whatever the environment says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from composer_se import ops
from composer_se import triton_kernels as kernels

__all__ = ["squeeze_excite"]


def squeeze_excite(
    u: Tensor, excite: Callable[[Tensor], Tensor], overwrite: bool, layer: str = "a SqueezeExciteConv2d"
) -> Tensor:
    """Scales every map of ``u`` by the gate that ``excite`` computes from the means of all maps.

    Args:
        u: Conv output of shape (..., C, H, W), contiguous or channels_last, in one of `ops.KERNEL_DTYPES`; not a view
            if ``overwrite``.
        excite: Takes the means, (..., C), and returns the gate's logits, of the same shape.
        overwrite: Whether the result is written over ``u``. Requires what `ops.gate_` requires.
        layer: Name of the layer, for the message of the error below.

    Returns:
        The scaled maps: ``u`` itself if ``overwrite``.

    Raises:
        ValueError: If the kernels don't take ``u``'s dtype or memory format.
        RuntimeError: In the backward pass, when the result of overwriting was changed in place after the forward pass.
    """
    link = _Link(kernels.memory_format_of(u))
    if torch.is_grad_enabled() and u.requires_grad:
        u, p = _Squeeze.apply(u, overwrite, link)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        p = kernels.squeeze(u)
    z = excite(p)
    if torch.is_grad_enabled() and (u.requires_grad or z.requires_grad):
        return _Gate.apply(u, z, overwrite, layer, link)  # pyright: ignore[reportReturnType]
    return _scaled(u, z, overwrite)


@dataclass
class _Link:
    """What the gate's backward pass leaves for the squeeze's, which always runs later."""

    memory_format: torch.memory_format
    # The logits by which the squeeze has to scale the gradient that the gate handed on; None if it is scaled already.
    # Detached: with a graph of their own they would keep the graph that keeps them.
    logits: Tensor | None = None
    # Whether nothing but the gate's backward pass sends gradients for the map. Double backward adds some.
    gate_is_alone: bool = True


class _Squeeze(torch.autograd.Function):
    """The mean over H and W, beside the map itself; its gradient is the whole gradient of the map."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, overwrite: bool, link: _Link) -> tuple[Tensor, Tensor]:
        if overwrite:
            # A tensor that is returned and not marked becomes a view, which the gate could not write into.
            ctx.mark_dirty(u)
        ctx.set_materialize_grads(False)
        ctx.link, ctx.map_shape = link, u.shape
        return u, kernels.squeeze(u)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, None, None]:
        g, grad_p = grad_outputs
        z = ctx.link.logits
        if g is not None and z is not None:
            return kernels.scale(g, z, out=torch.empty_like(g), added=grad_p), None, None
        # Double backward differentiates these lines; g is missing where somebody differentiates the excitation alone.
        if grad_p is None:
            return g, None, None
        height, width = ctx.map_shape[-2:]
        grad_u = ops.over_maps(grad_p / (height * width)).expand(ctx.map_shape)
        return grad_u if g is None else g + grad_u, None, None


class _Gate(torch.autograd.Function):
    """``v = u * sigmoid(z)``. Its gradient for ``u`` is left to `_Squeeze` to finish."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, z: Tensor, overwrite: bool, layer: str, link: _Link) -> Tensor:
        v = _scaled(u, z, overwrite)
        if overwrite:
            ctx.mark_dirty(v)
        ctx.save_for_backward(v if overwrite else u, z)
        ctx.overwrite, ctx.layer, ctx.link = overwrite, layer, link
        return v

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        kept, z = ops.saved_with_product(ctx) if ctx.overwrite else ctx.saved_tensors
        g = grad_outputs[0]
        u_needs_grad, z_needs_grad = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            # Double backward differentiates these lines, and their gradients for `kept` must not be scaled.
            ctx.link.gate_is_alone, ctx.link.logits = False, None
            gates = torch.sigmoid(z)
            slope = 1 - gates if ctx.overwrite else gates * (1 - gates)
            return g * ops.over_maps(gates), slope * (g * kept).sum((-2, -1)), None, None, None
        # Copies are rare: of expanded gradients, and of saved tensors that were on the host meanwhile.
        g = g.contiguous(memory_format=ctx.link.memory_format)
        kept = kept.contiguous(memory_format=ctx.link.memory_format)
        grad_z = kernels.logits_grad(g, kept, z, ctx.overwrite) if z_needs_grad else None
        if not u_needs_grad:
            return None, grad_z, None, None, None
        if ctx.link.gate_is_alone:
            ctx.link.logits = z.detach()
        else:
            g = kernels.scale(g, z, out=torch.empty_like(g))
        return g, grad_z, None, None, None


def _scaled(u: Tensor, z: Tensor, overwrite: bool) -> Tensor:
    """The product, written over ``u`` or else of the dtype that PyTorch gives it."""
    out = u if overwrite else torch.empty_like(u, dtype=torch.promote_types(u.dtype, z.dtype))
    return kernels.scale(u, z, out=out)
