"""The Squeeze-and-Excitation block, and a conv whose output a block scales.

Squeeze-and-Excitation Networks, Hu et al., https://arxiv.org/abs/1709.01507, section 3. Two things differ from the
paper, as in Composer: the block follows single convs, not residual branches, and the hidden width may be absolute.

Parameters have the names of Composer's built-in algorithm (``conv.weight``, ``se.pool_and_mlp.2.weight``,
``se.pool_and_mlp.4.weight``), so that each algorithm loads the checkpoints and optimizer states of the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composer_se import ops
from composer_se.options import check_init, check_latent_channels, latent_width, warn_of_inplace
from composer_se.pending_gate import pending_gate
from composer_se.wrapper import SqueezeExcited, is_plain, mark_as_squeeze_excited

__all__ = ["SqueezeExcite2d", "SqueezeExciteConv2d"]


class SqueezeExcite2d(nn.Module):
    """The Squeeze-and-Excitation block: scales every map by a gate computed from the means of all maps.

    Args:
        num_features: Number of channels of the input.
        latent_channels: Hidden width of the MLP: a whole number >= 1, or a share of ``num_features`` in (0, 1).
            Default: ``0.125``.
        init: ``"default"``, or ``"identity"`` for gates that start at 1, as in `composer_se.SqueezeExciteOptions`.
        inplace: An option of earlier versions without effect.
        **factory: ``device`` and ``dtype`` of the weights. Default: PyTorch's.

    Raises:
        TypeError: If ``latent_channels`` is not a number.
        ValueError: If ``latent_channels`` or ``init`` is out of range.

    Shape:
        Input and output: (N, C, H, W) or (C, H, W), with C = ``num_features``.
    """

    gate_limit = 1.0  # the gates lie between 0 and this
    __constants__ = ("gate_limit",)  # TorchScript sees no other attributes of a class
    _has_moved = True  # False while all gates may still be 1

    def __init__(
        self,
        num_features: int,
        latent_channels: float = 0.125,
        *,
        init: str = "default",
        inplace: object = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        warn_of_inplace(inplace)
        check_latent_channels(latent_channels)
        check_init(init)
        self.latent_channels = latent_width(latent_channels, num_features)
        reduce = nn.Linear(num_features, self.latent_channels, bias=False, **factory)
        expand = nn.Linear(self.latent_channels, num_features, bias=False, **factory)
        # The name and the keys are those of Composer's built-in: parts 2 and 4 of a Sequential.
        self.pool_and_mlp = nn.ModuleDict({"2": reduce, "4": expand})
        if init == "identity":
            self.gate_limit, self._has_moved = 2.0, False
            nn.init.zeros_(expand.weight)
            # Part of the state dict, so that weights of one ``init`` don't load into a block with the other.
            self.register_buffer("init_identity", torch.tensor(self.gate_limit, **factory))

    def forward(self, input: Tensor) -> Tensor:
        """A new tensor: the maps of ``input`` scaled by their gates."""
        return ops.gate(input, self.excite(input.mean((-2, -1))), self.gate_limit)

    def excite(self, squeezed: Tensor) -> Tensor:
        """The logits of the gates, (..., C), from the means of the maps, (..., C)."""
        return self.pool_and_mlp["4"](F.relu(self.pool_and_mlp["2"](squeezed), inplace=True))

    @torch.jit.unused
    def is_identity(self) -> bool:
        """True while all gates of an identity block are still 1. Reads the weights, but not after they have changed."""
        expand: Any = self.pool_and_mlp["4"]
        self._has_moved = self._has_moved or bool(expand.weight.any())
        return not self._has_moved

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # pyright: ignore
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}pool_and_mlp.4.weight" in state_dict:
            other = "identity" if f"{prefix}init_identity" in state_dict else "default"
            if (other == "identity") is (self.gate_limit == 1):
                args[-1].append(f'{prefix}init_identity: the weights are of a block with init="{other}", this is none.')
            self._has_moved = self.gate_limit == 1


class SqueezeExciteConv2d(SqueezeExcited):
    """A conv whose output is scaled by a Squeeze-and-Excitation block.

    Args:
        *args: Arguments of `torch.nn.Conv2d`. Left out when ``conv`` is given.
        latent_channels: Hidden width of the block: a whole number >= 1, or a share of the conv's output channels in
            (0, 1). Default: ``0.125``.
        conv: The conv to wrap; the block takes its device, dtype and mode. Default: a new one, from the arguments.
        followed_by_norm: True if a norm follows. While gradients are recorded, the norm then applies the gates if it
            can, unless the whole output has fewer than 2¹⁷ numbers. In training, SE then adds no pass over the maps and
            keeps no activation. Any other reader of the output gets the gated maps. Default: ``False``.
        init: ``"default"``, or ``"identity"`` for gates that start at 1, as in `composer_se.SqueezeExciteOptions`.
        inplace: An option of earlier versions without effect.
        **kwargs: Keyword arguments of `torch.nn.Conv2d`.

    Raises:
        TypeError: If ``latent_channels`` is not a number, or both ``conv`` and arguments for a new one are given.
        ValueError: If ``latent_channels`` or ``init`` is out of range.

    Attributes:
        conv: The conv.
    """

    inner = "conv"

    def __init__(
        self,
        *args: Any,
        latent_channels: float = 0.125,
        conv: nn.Conv2d | None = None,
        followed_by_norm: bool = False,
        init: str = "default",
        inplace: object = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if conv is None:
            conv = nn.Conv2d(*args, **kwargs)
        elif args or kwargs:
            raise TypeError("Give either conv or the arguments of a new Conv2d, not both.")
        self.followed_by_norm = followed_by_norm
        factory = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self._wrap(conv, SqueezeExcite2d(conv.out_channels, latent_channels, init=init, inplace=inplace, **factory))
        mark_as_squeeze_excited(conv)

    def forward(self, input: Tensor) -> Tensor:
        """The conv's output with every map scaled by its gate."""
        if torch.jit.is_scripting():
            return self.se(self.conv(input))
        return self.scale(self.conv(input))

    @torch.jit.unused
    def scale(self, u: Tensor) -> Tensor:
        """The gated form of the conv's output ``u``, which the caller must not use afterwards."""
        modules: dict[str, Any] = self._modules  # __getattr__ would take 5 of 84 µs at batch 1
        conv, se = modules["conv"], modules["se"]
        if ops.takes_plain_formula(u) or not is_plain(se, SqueezeExcite2d, "forward"):
            return se(u)
        owned, limit = is_plain(conv, nn.Conv2d, "forward", "_conv_forward"), se.gate_limit
        if not torch.is_grad_enabled():
            z = se.excite(u.mean((-2, -1)))
            return ops.gate(u, z, limit, in_place=owned)
        link = ops.Link()
        through, p, _ = ops.squeeze(u, link)
        z = se.excite(p.to(u.dtype))
        if self.followed_by_norm and u.numel() >= ops.MIN_NUMEL and (u.requires_grad or z.requires_grad):
            taken = False if se.is_identity() else None  # PyTorch's norm, for the same bits as before the surgery
            return pending_gate(u, z, limit, p, through, link, owned=owned, taken=taken)
        return ops.gate(u, z, limit)
