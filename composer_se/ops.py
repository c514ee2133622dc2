"""The arithmetic of Squeeze-and-Excitation on maps, alone and together with the norm that follows.

For a conv output ``u`` of shape (N, C, H, W) and the logits ``z`` (N, C) that the excitation makes of the squeeze,
Squeeze-and-Excitation (Hu et al., https://arxiv.org/abs/1709.01507, section 3) is

    p = mean of every map of u     squeeze, equation 2
    s = sigmoid(z)                 gate, equation 3
    v = u * s                      scale, equation 4

A norm that follows subtracts a mean of ``v`` and divides by a standard deviation. Both follow from numbers per map,
with ``q`` the population variance of every map of ``u``:

    mean of v      m = mean of s p
    variance of v  r = mean of s² q + (s p - m)²
    result         y = A (u - p) + B    with i = γ / sqrt(r + ε),  A = s i,  B = (s p - m) i + β

The means run over the batch, or over a group of channels of one image. So `gated_norm` never writes ``v``, and keeps
``u`` for backward where the norm alone would keep ``v``. With ``g = dL/dy``:

    dL/dA = Σ g (u - p),  dL/dB = Σ g                         over H and W
    dL/du = A g + (2 dL/dq / HW) (u - p) + (dL/dp) / HW

Only `mean`, `variance`, `affine` and `weighted_sums` see maps there. They use PyTorch's own kernels, on the view
(1, N·C, H, W) in which a kernel for channels works on single maps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

__all__ = ["MIN_NUMEL", "Link", "Norm", "affine", "gate", "gate_gradients", "gated_norm", "gates", "gradient_of_maps"]
__all__ += ["mean", "over_maps", "squeeze", "takes_norm", "takes_plain_formula", "variance", "weighted_sums"]

# Calls of operators cost more than passes over a smaller batch of maps: 0.8 against 0.4 ms for 16×64×8×8 on a CPU.
MIN_NUMEL = 2**17


def takes_plain_formula(u: Tensor) -> bool:
    """True if ``u * sigmoid(z)`` must be computed with plain operators, for tracers, compilers and transforms.

    Tracers (`torch.fx`, TorchScript, `torch.export`, ONNX) record operators, `torch.compile` fuses them, `torch.func`
    and forward-mode differentiation transform them; none gains from a backward pass of our own. Tensor subclasses (fake
    tensors, DTensors, proxies) have rules for the plain operators only.
    """
    return (
        type(u) is not Tensor
        or is_compiling()
        or torch.jit.is_tracing()
        # torch has no public test for these two: in a transform of `torch.func` tensors look like plain ones, and a
        # tangent may be on the weights alone.
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def takes_norm(u: Tensor, norm: Norm) -> bool:
    """Whether a norm can take the maps of ``u`` together with their gates.

    False for channels_last, which has no view as single maps, and for inputs that PyTorch's norm refuses (some maps
    that are empty or one pixel) or converts.
    """
    dtypes = u.dtype, torch.float64 if u.dtype == torch.float64 else torch.float32
    numbers = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None]
    return (
        u.dim() == 4
        and u.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and u.device.type in ("cpu", "cuda")
        and u.is_contiguous()
        and u.numel() > u.shape[0] * u.shape[1]
        and (norm.groups is None or (norm.groups > 0 and u.shape[1] % norm.groups == 0))
        and (norm.running_mean is None) is (norm.running_var is None)
        and not (norm.fixed and norm.running_mean is None)
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.shape == u.shape[1:2] for t in numbers)
        and all(t.device == u.device and t.dtype in dtypes for t in numbers)
    )


def mean(u: Tensor) -> Tensor:
    """The mean of every map of ``u`` (..., C, H, W): (..., C), in float64 if ``u`` is, else in float32."""
    return u.mean((-2, -1), dtype=torch.float64 if u.dtype == torch.float64 else torch.float32)


def variance(u: Tensor, p: Tensor) -> Tensor:
    """The population variance of every map of ``u`` (N, C, H, W), given the means ``p`` (N, C): (N, C)."""
    if not u.is_cpu:
        return torch.var_mean(u.to(p.dtype), (2, 3), correction=0)[0]
    # On the CPU `var_mean` takes 10 to 50 times as long as a sum (pytorch issue 69525). A mean square less a squared
    # mean loses digits where the mean is far above the standard deviation, so such maps are read again. A GPU would
    # have to wait for the check.
    mean_square = torch.linalg.vector_norm(u, 2, (2, 3), dtype=p.dtype).square_().div_(u.shape[2] * u.shape[3])
    q = torch.addcmul(mean_square, p, p, value=-1)
    imprecise = mean_square > 30 * q
    if imprecise.any():
        rows = u[imprecise].flatten(1).to(p.dtype)
        q[imprecise] = rows.sub_(rows.mean(1, keepdim=True)).square_().mean(1)
    return q


def affine(u: Tensor, p: Tensor | None, a: Tensor, b: Tensor | None) -> Tensor:
    """``a (u - p) + b`` for maps ``u`` (N, C, H, W) and numbers per map (N, C), in one pass; None is zero."""
    # Batch norm's kernel in evaluation mode with variance 1 and eps 0. `resize_` sets the shape without a view: `out +=
    # identity` can't change a view that a custom function returns.
    ones, a = a.new_ones(a.numel()), a.reshape(-1)
    p = torch.zeros_like(a) if p is None else p.reshape(-1)
    b = None if b is None else b.reshape(-1)
    return torch.native_batch_norm(_single_maps(u), a, b, p, ones, False, 0.0, 0.0)[0].resize_(u.shape)


def weighted_sums(g: Tensor, u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over H and W of ``g (u - p)`` and of ``g``: two tensors (N, C), in one pass."""
    kernel: Any = torch.ops.aten.native_batch_norm_backward
    ones, p1, only_sums = p.new_ones(p.numel()), p.view(-1), [False, True, True]
    _, weighted, plain = kernel(_single_maps(g), _single_maps(u), ones, None, None, p1, ones, True, 0.0, only_sums)
    return weighted.view_as(p), plain.view_as(p)


def _single_maps(u: Tensor) -> Tensor:
    return u.view(1, u.shape[0] * u.shape[1], *u.shape[2:])


def over_maps(per_channel: Tensor) -> Tensor:
    """A view of (..., C) that broadcasts over maps (..., C, H, W)."""
    return per_channel.unsqueeze(-1).unsqueeze(-1)


class Link:
    """Passes numbers from the backward pass of a norm with gates to that of `squeeze`, which writes dL/du once."""

    a: Tensor | None = None  # factor (N, C) of the incoming gradient; None if that is dL/du already
    dq: Tensor | None = None  # dL/dq, if autograd does not pass it
    memory: Tensor | None = None  # a full-size tensor for dL/du, from maps without `affine`


def squeeze(u: Tensor, link: Link, *, with_variance: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """``u`` (..., C, H, W) for one use by a norm, with the same ``link``; its `mean` and, if asked for, `variance`."""
    return _Squeeze.apply(u, link, with_variance)  # pyright: ignore[reportReturnType]


class _Squeeze(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, link: Link, with_variance: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        p = mean(u)
        ctx.link, ctx.shape, ctx.dtype = link, u.shape, u.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, p)
        return u.view_as(u), p, variance(u, p) if with_variance else None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g, dp, dq), link, area = grads, ctx.link, ctx.shape[-2] * ctx.shape[-1]
        if g is not None and link.memory is not None:
            share = g.new_zeros(()) if dp is None else over_maps(dp / area).to(ctx.dtype)
            memory, a, link.memory, link.a = link.memory, link.a, None, None
            return torch.addcmul(share, g, over_maps(a), out=memory), None, None
        if g is not None and link.a is not None:
            u, p = ctx.saved_tensors
            return gradient_of_maps(g, u, p, link.a, dp, link.dq if dq is None else dq), None, None
        # A view of stride 0: PyTorch's own gradient of the mean writes a full-size tensor.
        shares = [g, None if dp is None else over_maps(dp / area).to(ctx.dtype).expand(ctx.shape)]
        if dq is not None:  # for a second derivative
            u, p = ctx.saved_tensors
            shares.append((over_maps(dq * (2 / area)) * (u - over_maps(p))).to(ctx.dtype))
        shares = [share for share in shares if share is not None]
        return sum(shares[1:], shares[0]) if shares else None, None, None


def gradient_of_maps(g: Tensor, u: Tensor, p: Tensor, a: Tensor, dp: Tensor, dq: Tensor | None) -> Tensor:
    """Computes dL/du from ``g = dL/dy``, the factor ``a`` of `affine`, ``dp = dL/dp`` and ``dq = dL/dq``."""
    area = u.shape[2] * u.shape[3]
    if dq is None:
        return affine(g, None, a, dp / area)
    # In one full-size tensor: page faults of a second took 9 of 22 ms for 16×512×28×28 on a CPU.
    return affine(u, p, dq * (2 / area), dp / area).addcmul_(g, over_maps(a.to(g.dtype)))


def gates(z: Tensor, limit: float) -> Tensor:
    """``limit * sigmoid(z)``: the gates, of the shape of their logits ``z``."""
    s = torch.sigmoid(z)
    return s if limit == 1 else s * limit


def gate(u: Tensor, z: Tensor, limit: float, in_place: bool = False) -> Tensor:
    """Maps ``u`` (..., C, H, W) times their `gates`, from logits ``z`` (..., C). In place only without gradients."""
    s = over_maps(gates(z, limit))
    return u.mul_(s) if in_place else u * s


def gate_gradients(
    g: Tensor, u: Tensor, z: Tensor, limit: float, link: Link | None = None, *, overwritten: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of `gate` for ``u`` and ``z``; ``overwritten`` is True if ``u`` holds the product.

    With a ``link``, ``g`` in place of the first: `squeeze` multiplies it by the gates as it adds its own share.
    """
    s, recorded = gates(z, limit), torch.is_grad_enabled()
    slope = s * (1 - s / limit)
    if overwritten:  # dL/dz = s (1 - s / limit) Σ g u = (1 - s / limit) Σ g v
        slope, u = 1 - s / limit, _Overwritten.apply(u, z, limit) if recorded else u  # pyright: ignore[reportAssignmentType]
    products = g * u
    dz = slope * products.sum((-2, -1))
    if link is not None:
        link.a, link.memory = s, products
        return g, dz
    # Reuses the memory, to avoid page faults, unless the result is to be differentiated again.
    return g * over_maps(s) if recorded else torch.mul(g, over_maps(s), out=products), dz


class _Overwritten(torch.autograd.Function):
    """`gate` where the memory of ``u`` holds the product already: for derivatives of its gradients."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, z: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(u, z)
        ctx.limit = limit
        return u.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        u, z = ctx.saved_tensors
        return *gate_gradients(grads[0], u, z, ctx.limit, overwritten=True), None


@dataclass(frozen=True)
class Norm:
    """A normalisation of (N, C, H, W), with arguments named as in `torch.nn.functional`."""

    groups: int | None  # each group of channels is normalised within one image; None: each channel over the batch
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.0
    fixed: bool = False  # True: by the running statistics, (C,), instead of the input's

    def of(self, v: Tensor) -> Tensor:
        """The normalised ``v``, by PyTorch; running statistics stay as they are."""
        if self.groups is not None:
            return F.group_norm(v, self.groups, self.weight, self.bias, self.eps)
        running = (self.running_mean, self.running_var) if self.fixed else (None, None)
        return F.batch_norm(v, *running, self.weight, self.bias, not self.fixed, 0.0, self.eps)

    def update(self, m: Tensor, r: Tensor, count: int) -> None:
        """Moves the running statistics to means and variances that come from ``count`` numbers each."""
        for running, of_input in ((self.running_mean, m), (self.running_var, r * (count / (count - 1)))):
            if running is not None:
                of_input = of_input if self.groups is None else of_input.mean(0)
                running.lerp_(of_input.view(-1).to(running.dtype), self.momentum)


def gated_norm(through: Tensor, u: Tensor, p: Tensor, z: Tensor, limit: float, norm: Norm, link: Link | None) -> Tensor:
    """``norm(gate(u, z, limit))`` without the product; running statistics are updated unless they are fixed.

    ``u`` is (N, C, H, W), with the means ``p`` and the logits ``z`` of the gates, (N, C). In the first call for a map,
    ``through`` and ``link`` are those of `squeeze`, which then writes the gradient of ``u``. In later calls they are
    ``u`` and None.
    """
    inputs = through, z, norm.weight, norm.bias, u, p, limit, norm, link
    return _GatedNorm.apply(*inputs)  # pyright: ignore[reportReturnType]


class _GatedNorm(torch.autograd.Function):
    """Numbers per map have the shape (N, G, C/G); the statistics are means over the batch, or over a group.

    The gradient is written out: forty recorded operators would take as long as the passes over small maps.
    """

    @staticmethod
    def forward(
        ctx: Any, _: Any, z: Tensor, weight: Any, bias: Any, u: Tensor, p: Tensor, limit: float, norm: Norm, link: Any
    ) -> Tensor:
        (n, c), groups = p.shape, norm.groups or 1
        grouped, dim = (n, groups, c // groups), 0 if norm.groups is None else 2

        def per_channel(t: Any) -> Tensor:
            return t.to(p.dtype).view(1, *grouped[1:])

        s, q = gates(z.to(p.dtype), limit).view(grouped), None
        d = s * p.view(grouped)
        if norm.fixed:
            m = per_channel(norm.running_mean)
            d -= m
            inverse = (per_channel(norm.running_var) + norm.eps).rsqrt_()
        else:
            q = variance(u, p).view(grouped)
            m = d.mean(dim, keepdim=True)
            d -= m
            r = torch.addcmul(d.square(), s.square(), q).mean(dim, keepdim=True)
            norm.update(m, r, u.numel() // m.numel())
            inverse = (r + norm.eps).rsqrt_()
        i = inverse if weight is None else inverse * per_channel(weight)
        b = d * i if bias is None else torch.addcmul(per_channel(bias), d, i)
        fixed = (norm.running_mean, norm.running_var) if norm.fixed else (None, None)
        ctx.save_for_backward(u, z, weight, bias, p, q, m, inverse, i, *fixed)
        ctx.norm, ctx.link, ctx.limit, ctx.grouped, ctx.dim = norm, link, limit, grouped, dim
        return affine(u, p, (s * i).view(n, c), b.view(n, c))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        u, z, weight, bias, p, q, m, inverse, i, *fixed = ctx.saved_tensors
        g, link, dim, needed = grads[0].contiguous(), ctx.link, ctx.dim, ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            if link is not None:
                link.a = None  # what goes to `squeeze` is dL/du
            norm = replace(ctx.norm, running_mean=fixed[0], running_var=fixed[1])
            return *_recorded_gradients(norm, g, (u, z, weight, bias), ctx.limit, needed), *(None,) * 5
        s = gates(z.to(p.dtype), ctx.limit).view(ctx.grouped)
        da, db = (t.view(s.shape) for t in weighted_sums(g, u, p))
        d = s * p.view(s.shape) - m
        d_i, d_s, d_sp, d_q, a = torch.addcmul(da * s, db, d), da * i, db * i, None, s * i
        if dim == 0:  # what is shared by the batch is small from here on
            d_i = d_i.sum(0, keepdim=True)
        if q is not None:
            gamma = 1 if weight is None else weight.to(p.dtype).view(1, *s.shape[1:])
            d_inverse = (d_i * gamma).sum(dim, keepdim=True)
            # dL/dr for each term of the mean r = mean of (d² + s² q).
            d_term = d_inverse * inverse**3 * (-0.5 / s.shape[dim])
            d_sp = torch.addcmul(d_sp, d, d_term, value=2)
            d_sp -= d_sp.mean(dim, keepdim=True)
            s_term = s * d_term
            d_s = torch.addcmul(d_s, s_term, q, value=2)
            d_q = (s * s_term).view_as(p)
        du, a, dp = g, a.view_as(p), torch.addcmul(s * d_sp, a, db, value=-1).view_as(p)
        if link is not None:
            link.a, link.dq = a, d_q
        elif needed[0]:
            du = gradient_of_maps(g, u, p, a, dp, d_q)
        d_z = torch.addcmul(d_s, p.view(s.shape), d_sp) * (s * (1 - s / ctx.limit))
        return (
            du if needed[0] else None,
            d_z.view_as(z).type_as(z) if needed[1] else None,
            (d_i * inverse).sum(0).view(-1).type_as(weight) if needed[2] else None,
            db.sum(0).view(-1).type_as(bias) if needed[3] else None,
            None,
            None if link is None else dp,
            *(None,) * 3,
        )


def _recorded_gradients(
    norm: Norm, g: Tensor, inputs: tuple[Any, ...], limit: float, needed: tuple[bool, ...]
) -> tuple[Any, ...]:
    """The gradients of `gated_norm` by PyTorch's own formulas, which can be differentiated again."""
    # Views, so that the gradient of u is not also taken through z. Views of u, not of what `squeeze` returned, whose
    # backward pass must not scale the gradient again.
    views: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    y = replace(norm, weight=views[2], bias=views[3]).of(gate(views[0], views[1], limit))
    wanted = [t for t, is_needed in zip(views, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
    return tuple(next(found) if is_needed else None for is_needed in needed)
