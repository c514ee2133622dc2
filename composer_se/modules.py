"""The Squeeze-and-Excitation block, and the conv that carries one.

Squeeze-and-Excitation Networks, Hu et al., https://arxiv.org/abs/1709.01507, section 3. Two things differ from the
paper, as in Composer: the block follows single convs, not residual branches, and the hidden width may be absolute.

Parameters have the names of Composer's built-in algorithm (``conv.weight``, ``se.pool_and_mlp.2.weight``,
``se.pool_and_mlp.4.weight``), so that checkpoints, optimizer states and sharded checkpoints go both ways.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from composer_se import ops
from composer_se.options import check_latent_channels, latent_width, warn_of_inplace
from composer_se.pending_gate import pending_gate

__all__ = ["SqueezeExcite2d", "SqueezeExciteConv2d"]


class SqueezeExcite2d(nn.Module):
    """The Squeeze-and-Excitation block: scales every map by a gate computed from the means of all maps.

    Args:
        num_features: Number of channels of the input.
        latent_channels: Hidden width of the MLP: a whole number >= 1, or a share of ``num_features`` in (0, 1).
            Default: ``0.125``.
        inplace: Not needed any more.
        **factory: ``device`` and ``dtype`` of the weights. Default: PyTorch's.

    Raises:
        TypeError: If ``latent_channels`` is not a number.
        ValueError: If ``latent_channels`` is out of range.

    Shape:
        Input and output: (N, C, H, W) or (C, H, W), with C = ``num_features``.
    """

    def __init__(
        self, num_features: int, latent_channels: float = 0.125, *, inplace: object = None, **factory: Any
    ) -> None:
        super().__init__()
        warn_of_inplace(inplace)
        check_latent_channels(latent_channels)
        self.latent_channels = latent_width(latent_channels, num_features)
        reduce = nn.Linear(num_features, self.latent_channels, bias=False, **factory)
        expand = nn.Linear(self.latent_channels, num_features, bias=False, **factory)
        # The name and the keys are those of Composer's built-in: parts 2 and 4 of a Sequential.
        self.pool_and_mlp = nn.ModuleDict({"2": reduce, "4": expand})

    def forward(self, input: Tensor) -> Tensor:
        """A new tensor: the maps of ``input`` scaled by their gates."""
        logits = self.excite(input.mean((-2, -1)))
        return input * torch.sigmoid(logits).unsqueeze(-1).unsqueeze(-1)

    def excite(self, squeezed: Tensor) -> Tensor:
        """The logits of the gates, (..., C), from the means of the maps, (..., C)."""
        return self.pool_and_mlp["4"](F.relu(self.pool_and_mlp["2"](squeezed), inplace=True))


class SqueezeExciteConv2d(nn.Module):
    """A conv whose output is scaled by a Squeeze-and-Excitation block.

    Attributes that it lacks (``weight``, ``stride``, ...) are the conv's, and setting them sets the conv's; only a
    parameter has to be assigned to the conv itself. A state dict of the bare conv loads into it, and the block keeps
    its weights.

    Args:
        *args: Arguments of `torch.nn.Conv2d`. Left out when ``conv`` is given.
        latent_channels: Hidden width of the block: a whole number >= 1, or a share of the conv's output channels in
            (0, 1). Default: ``0.125``.
        conv: The conv to wrap; the block takes its device, dtype and mode. Default: a new one, from the arguments.
        followed_by_norm: Whether the output goes to a norm, which then takes the gates along while gradients are
            recorded: SE has no pass over the maps and keeps no activation. The numbers are the same for every reader of
            the output. `composer_se.apply_squeeze_excite` finds out by itself. Default: ``False``.
        inplace: Not needed any more.
        **kwargs: Keyword arguments of `torch.nn.Conv2d`.

    Raises:
        TypeError: If ``latent_channels`` is not a number, or both ``conv`` and arguments for a new one are given.
        ValueError: If ``latent_channels`` is out of range.

    Attributes:
        conv: The conv.
        se: Its `SqueezeExcite2d`.
    """

    def __init__(
        self,
        *args: Any,
        latent_channels: float = 0.125,
        conv: nn.Conv2d | None = None,
        followed_by_norm: bool = False,
        inplace: object = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        warn_of_inplace(inplace)
        if conv is None:
            conv = nn.Conv2d(*args, **kwargs)
        elif args or kwargs:
            raise TypeError("Give either conv or the arguments of a new Conv2d, not both.")
        self.followed_by_norm = followed_by_norm
        self.conv = conv
        self.se = SqueezeExcite2d(
            conv.out_channels, latent_channels, device=conv.weight.device, dtype=conv.weight.dtype
        )
        self.train(conv.training)
        # The mark by which Composer's built-in algorithm knows a conv that has SE already.
        conv._already_squeeze_excited = True  # pyright: ignore[reportArgumentType]

    def forward(self, input: Tensor) -> Tensor:
        """The conv's output with every map scaled by its gate."""
        if torch.jit.is_scripting():
            return self.se(self.conv(input))
        return self.scale(self.conv(input))

    @torch.jit.unused
    def scale(self, u: Tensor) -> Tensor:
        """The gated form of the conv's output ``u``, which the caller must not use afterwards."""
        conv, se = self.conv, self.se
        if ops.takes_plain_formula(u) or not _is_plain(se, SqueezeExcite2d, "forward"):
            return se(u)
        owned = _is_plain(conv, nn.Conv2d, "forward", "_conv_forward")
        if not torch.is_grad_enabled():
            z = se.excite(u.mean((-2, -1)))
            return ops.gate_(u, z) if owned else ops.gate(u, z)
        link = ops.Link()
        through, p = ops.squeeze(u, link)
        z = se.excite(p.to(u.dtype))
        if self.followed_by_norm and (u.requires_grad or z.requires_grad):
            return pending_gate(u, z, p, through, link, owned=owned)
        return ops.gate(u, z)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not self.conv, which would come back here while the module is being unpickled.
            conv = self.__dict__.get("_modules", {}).get("conv")
            if conv is None:
                raise
            return getattr(conv, name)

    def __setattr__(self, name: str, value: Any) -> None:
        conv = self.__dict__.get("_modules", {}).get("conv")
        if conv is None or name.startswith("_") or name in self.__dict__ or name in self._modules:
            super().__setattr__(name, value)
        elif name in conv._parameters:
            # Folding a batch norm into the conv does this, and the gate stands between the two.
            raise TypeError(
                f"{name} belongs to the conv inside this SqueezeExciteConv2d. Assign to its .conv.{name} if the gate "
                "shall scale what the conv makes of it; a norm that follows the gate can't be folded into the conv."
            )
        elif name in conv.__dict__ and not hasattr(type(self), name):
            setattr(conv, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        own = (f"{prefix}conv.", f"{prefix}se.")
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
            state_dict[f"{prefix}conv.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _is_plain(module: nn.Module, module_class: type[nn.Module], *methods: str) -> bool:
    """Whether calling ``module`` runs these methods of its class and nothing more: nobody else can hold the result.

    Hooks on the backward pass, too, hold a view of it. Parametrised modules are plain in this respect.
    """
    # torch has no public question for hooks, be they a module's or those of all modules.
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    hooks = hooks or _module._global_forward_hooks or _module._global_forward_pre_hooks
    hooks = hooks or _module._global_backward_hooks or _module._global_backward_pre_hooks
    if hooks or not module.__dict__.keys().isdisjoint(methods) or not isinstance(module, module_class):
        return False
    return all(getattr(type(module), method) is getattr(module_class, method) for method in methods)
