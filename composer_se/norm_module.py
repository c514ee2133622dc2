"""The norm whose output is scaled by a Squeeze-and-Excitation block: the paper's order, conv, norm, block.

Squeeze-and-Excitation Networks, Hu et al., https://arxiv.org/abs/1709.01507, figures 2 and 3. With the means ``p`` and
the variances ``q`` of the maps of the conv's output ``u``, batch norm with its scale ``i = γ / sqrt(r + ε)`` makes

    x = i (u - m) + β,      m = mean of p,  r = mean of q + (p - m)²     over the batch
    y = s x = s i (u - p) + s o,    o = i (p - m) + β                    the squeeze of x is o

So the block needs no pass of its own and keeps no map: the norm's two passes read ``u``. The arithmetic between them is
on numbers per map, under ordinary autograd.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from composer_se import ops
from composer_se.modules import SqueezeExcite2d
from composer_se.wrapper import SqueezeExcited, is_plain

__all__ = ["SqueezeExciteNorm2d"]


class SqueezeExciteNorm2d(SqueezeExcited):
    """A norm whose output is scaled by a Squeeze-and-Excitation block.

    Args:
        norm: The norm to wrap. Its input has the shape (N, C, H, W). The block starts in its mode, training or
            evaluation. While gradients are recorded, `torch.nn.BatchNorm2d` applies the gates in its own passes, unless
            the whole input has fewer than 2¹⁷ numbers. Other norms leave the gates to the block.
        num_features: Channels of the map.
        latent_channels: Hidden width of the block: a whole number >= 1, or a share of ``num_features`` in (0, 1).
            Default: ``0.125``.
        init: ``"default"``, or ``"identity"`` for gates that start at 1, as in `composer_se.SqueezeExciteOptions`.
        **factory: ``device`` and ``dtype`` of the block's weights. Default: PyTorch's.

    Raises:
        TypeError: If ``latent_channels`` is not a number.
        ValueError: If ``latent_channels`` or ``init`` is out of range.

    Attributes:
        norm: The norm.
    """

    inner = "norm"

    def __init__(
        self,
        norm: nn.Module,
        num_features: int,
        latent_channels: float = 0.125,
        *,
        init: str = "default",
        **factory: Any,
    ) -> None:
        super().__init__()
        self._wrap(norm, SqueezeExcite2d(num_features, latent_channels, init=init, **factory))

    def forward(self, input: Tensor) -> Tensor:
        """The norm's output with every map scaled by its gate."""
        if torch.jit.is_scripting():
            return self.se(self.norm(input))
        return self._normalise(input)

    @torch.jit.unused
    def _normalise(self, u: Tensor) -> Tensor:
        norm: Any = self.norm
        se: SqueezeExcite2d = self.se
        if ops.takes_plain_formula(u) or not is_plain(se, SqueezeExcite2d, "forward"):
            return se(norm(u))
        owned = is_plain(norm, nn.BatchNorm2d, "forward")
        if not torch.is_grad_enabled():
            y = norm(u)
            z = se.excite(y.mean((-2, -1)))
            return ops.gate(y, z, se.gate_limit, in_place=owned)
        # While all gates are 1, PyTorch's norm gives the same bits as before the surgery.
        if owned and u.numel() >= ops.MIN_NUMEL and ops.takes_norm(u, _as_data(norm)) and not se.is_identity():
            return _batch_norm_and_gate(u, norm, se)
        return se(norm(u))


def _as_data(norm: nn.BatchNorm2d) -> ops.Norm:
    fixed = not norm.training and norm.running_mean is not None
    return ops.Norm(None, norm.eps, norm.weight, norm.bias, norm.running_mean, norm.running_var, fixed=fixed)


def _batch_norm_and_gate(u: Tensor, norm: Any, se: SqueezeExcite2d) -> Tensor:
    """``se(norm(u))`` in the passes of the norm."""
    link, fixed = ops.Link(), _as_data(norm).fixed
    moments: Any = ops.squeeze(u, link, with_variance=not fixed)
    through, p, q = moments
    if not fixed:
        m = p.mean(0)
        d = p - m
        r = (q + d.square()).mean(0)
        with torch.no_grad():
            _update_running_statistics(norm, m, r, u.numel() // u.shape[1])
    else:
        d, r = p - norm.running_mean, norm.running_var.to(p.dtype)
    i = (r + norm.eps).rsqrt()
    if norm.weight is not None:
        i = i * norm.weight
    o = d * i
    if norm.bias is not None:
        o = o + norm.bias
    s = ops.gates(se.excite(o.to(u.dtype)).to(p.dtype), se.gate_limit)
    return _Affine.apply(through, p, s * i, s * o, link)  # pyright: ignore[reportReturnType]


def _update_running_statistics(norm: nn.BatchNorm2d, m: Tensor, r: Tensor, count: int) -> None:
    """Updates as `torch.nn.BatchNorm2d` does in training, from means and variances of ``count`` numbers each."""
    if norm.running_mean is None or norm.running_var is None or not norm.track_running_stats:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    replace(_as_data(norm), momentum=momentum or 0.0).update(m, r, count)


class _Affine(torch.autograd.Function):
    """``a (u - p) + b`` for maps ``u`` and numbers per map.

    The backward pass of `ops.squeeze` writes dL/du, except for second derivatives.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, p: Tensor, a: Tensor, b: Tensor, link: ops.Link) -> Tensor:
        ctx.save_for_backward(u, p, a)
        ctx.link = link
        return ops.affine(u, p, a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        (u, p, a), link, g = ctx.saved_tensors, ctx.link, grads[0].contiguous()
        if torch.is_grad_enabled():
            link.a = None
            numbers = g.to(p.dtype)
            da, db = (numbers * (u - ops.over_maps(p))).sum((2, 3)), numbers.sum((2, 3))
            return (numbers * ops.over_maps(a)).to(g.dtype), -a * db, da, db, None
        link.a = a
        da, db = ops.weighted_sums(g, u, p)
        return g, -a * db, da, db, None
