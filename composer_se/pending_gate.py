"""A gated map whose product is not computed yet, so that the norm that follows can apply the gates itself.

A conv can't know who reads its output, so the output must be right for every reader. `PendingGate` looks like the gated
map, but holds only ``u`` and the logits of its gates:

- A norm of `torch.nn.functional` takes map and gates together, once (`composer_se.ops.gated_norm`). If it can't, for
  instance in channels_last, the map is gated in place at that moment: a norm keeps its input for backward and never
  changes it.
- Any other function called from Python (``__torch_function__``) gets the product, which is made once. From then on the
  norm gets that product too, since ``u`` is still needed.
- Code below ``__torch_function__``, in C++ for instance, gets the product's values from ``__torch_dispatch__``. What
  autograd connects to the pending map itself (custom functions, checkpoints) gets its gradient from an autograd node.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_map_only

from composer_se import ops

__all__ = ["PendingGate", "pending_gate"]


@dataclass
class _Map:
    """A map, the logits of its gates, and whether a norm has taken or overwritten it."""

    u: Tensor  # the conv's output
    z: Tensor  # logits of the gates
    limit: float  # the gates are `limit * sigmoid(z)`
    p: Tensor  # the means of the maps
    through: Tensor  # `u` as `ops.squeeze` returned it, until the first norm takes it; then `u`
    link: ops.Link | None  # as given to `ops.squeeze`, likewise; then None
    owned: bool  # whether nobody else can hold `u`, so that it may be overwritten
    taken: bool | None = None  # whether a norm takes map and gates; None while none has asked
    overwritten: bool = False  # whether the product lies where `u` was


class PendingGate(Tensor):
    """Looks like the gated map, holds no memory. Made by `pending_gate`."""

    own: _Map
    product: Tensor | None = None  # None until a reader needs it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT_ITSELF:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _KEEP_INPUT and args and type(args[0]) is cls:
            return _normalise(func, args[0], args[1:], kwargs)
        if func in _ABOUT_GRADIENTS:
            tree_map_only(PendingGate, _refuse_if_taken, (args, kwargs))
        return func(*tree_map_only(PendingGate, _gated, args), **tree_map_only(PendingGate, _gated, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise RuntimeError(
                f"{func} would change the output of a conv with Squeeze-and-Excitation in place where its gradient "
                "can't follow. Give it a copy: call .clone() on the conv's output first."
            )
        with torch.no_grad():
            args, kwargs = tree_map_only(PendingGate, _gated_values, (args, kwargs or {}))
            return func(*args, **kwargs)


class _Pending(torch.autograd.Function):
    """The gradient of the product, without its memory."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, through: Tensor, z: Tensor, own: _Map) -> Tensor:
        ctx.save_for_backward(u, z)
        ctx.own = own
        # The way to make a tensor without memory; torch's guide to subclasses shows no public one.
        make: Any = Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
        pending = make(PendingGate, u.size(), strides=u.stride(), dtype=u.dtype, device=u.device)
        pending.own = own
        return pending

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        own = ctx.own
        u, z = (own.u, own.z) if own.overwritten else ctx.saved_tensors
        link = own.link if ctx.needs_input_grad[1] and not torch.is_grad_enabled() else None
        du, dz = ops.gate_gradients(grads[0], u, z, own.limit, link, overwritten=own.overwritten)
        return (du, None, dz, None) if link is None else (None, du, dz, None)


class _Made(torch.autograd.Function):
    """The product. It saves nothing: activation checkpoints may make it in one place and use it in another."""

    @staticmethod
    def forward(ctx: Any, pending: PendingGate) -> Tensor:
        own = pending.own
        return ops.gate(own.u, own.z, own.limit, in_place=own.overwritten).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return grads[0]


# Attributes and methods with the same result for the pending map and the product.
_GETTERS = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf")
_ABOUT_ITSELF = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
_ABOUT_ITSELF |= {getattr(Tensor, name).__get__ for name in _GETTERS}
_ABOUT_GRADIENTS = {Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad}
_KEEP_INPUT = {
    norm: {name: parameter.default for name, parameter in list(inspect.signature(norm).parameters.items())[1:]}
    for norm in (F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm)
}


def pending_gate(
    u: Tensor, z: Tensor, limit: float, p: Tensor, through: Tensor, link: ops.Link, *, owned: bool, taken: bool | None
) -> Tensor:
    """Returns a tensor that every reader sees as ``u * limit * sigmoid(z)``; the arguments are those of `_Map`."""
    own = _Map(u, z, limit, p, through, link, owned, taken)
    return _Pending.apply(u, through, z, own)  # pyright: ignore[reportReturnType]


def _gated(pending: PendingGate) -> Tensor:
    """The product."""
    if pending.product is None:
        with torch.enable_grad():  # it is kept, and the next reader may want gradients
            pending.product = _Made.apply(pending)  # pyright: ignore[reportAttributeAccessIssue]
    return pending.product  # pyright: ignore[reportReturnType]


def _gated_values(pending: PendingGate) -> Tensor:
    """The product without a gradient."""
    own = pending.own
    return (ops.gate(own.u, own.z, own.limit) if pending.product is None else pending.product).detach()


def _refuse_if_taken(pending: PendingGate) -> None:
    if pending.own.taken:
        raise RuntimeError(
            "A norm took a conv's output with its gates, so the gated map has no gradient. Ask before the norm runs: "
            "retain_grad() or register_hook() in a forward hook of the SqueezeExciteConv2d, for instance."
        )


@_disable_dynamo  # a norm that is compiled by itself; the public form imports all of the compiler at once
def _normalise(func: Any, pending: PendingGate, args: Any, kwargs: Any) -> Tensor:
    """Calls a norm on a pending map."""
    own, norm = pending.own, None
    given: dict[str, Any] = {**_KEEP_INPUT[func], **dict(zip(_KEEP_INPUT[func], args, strict=False)), **kwargs}
    scale = given["weight"], given["bias"]
    if func is F.batch_norm or func is F.instance_norm:
        fixed = not given["training" if func is F.batch_norm else "use_input_stats"]
        # Single maps are groups of one channel; fixed statistics are per channel either way.
        groups = None if func is F.batch_norm or fixed else own.u.shape[1]
        running = given["running_mean"], given["running_var"]
        norm = ops.Norm(groups, given["eps"], *scale, *running, given["momentum"], fixed)
    elif func is F.group_norm and not torch.is_autocast_enabled(own.u.device.type):
        # Under autocast PyTorch's group norm returns float32 on some devices.
        norm = ops.Norm(given["num_groups"], given["eps"], *scale)
    if norm is not None and not ops.takes_norm(own.u, norm):
        norm = None
    if own.taken is None:
        # Decided once: under activation checkpointing the norm is called again and must do the same.
        own.taken = norm is not None and pending.product is None
    # The norm must see a product that was changed in place. Only its version counter shows the change.
    if norm is not None and own.taken and (pending.product is None or pending.product._version == 0):
        through, link, own.through, own.link = own.through, own.link, own.u, None
        return ops.gated_norm(through, own.u, own.p, own.z, own.limit, norm, link)
    if pending.product is None and own.owned and not own.taken:
        own.overwritten = True  # a norm keeps its input and never changes it
    return func(_gated(pending), *args, **kwargs)
