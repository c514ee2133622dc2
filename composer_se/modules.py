"""The Squeeze-and-Excitation block, and the conv that carries one.

Squeeze-and-Excitation Networks, Hu et al., https://arxiv.org/abs/1709.01507, section 3. Two things differ from the
paper, as in Composer: the block follows single convs, not residual branches, and the hidden width may be absolute.

Parameters have the names of Composer's built-in algorithm (``conv.weight``, ``se.pool_and_mlp.2.weight``,
``se.pool_and_mlp.4.weight``), so that checkpoints, optimizer states and sharded checkpoints go both ways.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils.hooks import RemovableHandle

from composer_se import ops

__all__ = ["SqueezeExcite2d", "SqueezeExciteConv2d", "check_inplace", "check_latent_channels", "latent_width"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_WIDTH_ADVICE = (
    "Give a whole number >= 1 for a width, or a fraction between 0 and 1 for a share of the conv's output channels."
)

_GLOBAL_HOOKS = (
    _module._global_forward_pre_hooks,
    _module._global_forward_hooks,
    _module._global_backward_pre_hooks,
    _module._global_backward_hooks,
)


def check_latent_channels(latent_channels: float) -> None:
    """Checks a hidden width, absolute or a share.

    Args:
        latent_channels: A whole number >= 1, or a fraction in (0, 1).

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is neither a width nor a share.
    """
    if isinstance(latent_channels, bool) or not isinstance(latent_channels, numbers.Real):
        raise TypeError(
            f"latent_channels is {latent_channels!r} of type {type(latent_channels).__name__}. {_WIDTH_ADVICE}"
        )
    width = float(latent_channels)
    if not (0 < width < 1 or (width >= 1 and width.is_integer())):
        raise ValueError(f"latent_channels is {latent_channels!r}. {_WIDTH_ADVICE}")


def latent_width(latent_channels: float, num_features: int) -> int:
    """The number of hidden units of a block.

    Args:
        latent_channels: A whole number >= 1, or a share of ``num_features`` in (0, 1).
        num_features: Channels of the gated map.

    Returns:
        The width; a share is rounded down, but never to nothing.
    """
    share = latent_channels < 1
    return max(1, int(latent_channels * num_features)) if share else int(latent_channels)


def check_inplace(inplace: bool | str) -> None:
    """Checks the choice of where the gated map is written.

    Raises:
        ValueError: If it is none of ``"auto"``, True and False.
    """
    if inplace != "auto" and not isinstance(inplace, bool):
        raise ValueError(f'inplace is {inplace!r}; choose "auto", True or False.')


class SqueezeExcite2d(nn.Module):
    """The Squeeze-and-Excitation block: scales every map by a gate computed from the means of all maps.

    Args:
        num_features: Number of channels of the input.
        latent_channels: Hidden width of the MLP: a whole number >= 1, or a share of ``num_features`` in (0, 1).
            Default: ``0.125``.
        inplace: Whether the input is overwritten. ``"auto"`` does so only where the caller says in `forward` that it
            may be. Default: ``"auto"``.
        device: Device of the weights. Default: PyTorch's.
        dtype: Dtype of the weights. Default: PyTorch's.

    Raises:
        TypeError: If ``latent_channels`` is not a number.
        ValueError: If ``latent_channels`` or ``inplace`` is out of range.

    Shape:
        Input and output: (N, C, H, W) or (C, H, W), with C = ``num_features``.
    """

    def __init__(
        self,
        num_features: int,
        latent_channels: float = 0.125,
        *,
        inplace: bool | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_latent_channels(latent_channels)
        check_inplace(inplace)
        self.latent_channels = latent_width(latent_channels, num_features)
        self.inplace = inplace
        self.layer_name = f"a SqueezeExcite2d with {num_features} channels"
        self.pool_and_mlp = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(-3),
            nn.Linear(num_features, self.latent_channels, bias=False, device=device, dtype=dtype),
            nn.ReLU(inplace=True),
            nn.Linear(self.latent_channels, num_features, bias=False, device=device, dtype=dtype),
            nn.Sigmoid(),
        )

    def forward(self, input: Tensor, may_overwrite: bool = False) -> Tensor:
        """Scales the maps of ``input`` by their gates.

        Args:
            input: Maps of shape (N, C, H, W) or (C, H, W).
            may_overwrite: Whether ``inplace="auto"`` may write the result over ``input``.

        Returns:
            Tensor of the same shape.
        """
        if torch.jit.is_scripting():
            return self._plain(input)
        excite = None if ops.takes_plain_formula(input) else self._excitation()
        if excite is None:
            return self._plain(input)
        overwrite = self.inplace is True or (may_overwrite and self.inplace == "auto")
        if ops.takes_kernels(input):
            return self._gate_with_kernels(input, excite, overwrite)
        logits = excite(ops.squeeze(input))
        if overwrite:
            return ops.gate_(input, logits, self.layer_name)
        return ops.gate(input, logits)

    def _plain(self, input: Tensor) -> Tensor:
        return input * self.pool_and_mlp(input).unsqueeze(-1).unsqueeze(-1)

    @torch.jit.unused
    def _excitation(self) -> Callable[[Tensor], Tensor] | None:
        """What makes logits, (..., C), of the squeezed input, (..., C); None if pool or sigmoid must run as modules."""
        mlp = self.pool_and_mlp
        if any(_GLOBAL_HOOKS) or not _is_untouched(mlp, nn.Sequential) or len(mlp) != 6:
            return None
        pool, flatten, fc1, relu, fc2, sigmoid = mlp
        if not (
            _is_untouched(pool, nn.AdaptiveAvgPool2d)
            and _is_untouched(flatten, nn.Flatten)
            and _is_untouched(sigmoid, nn.Sigmoid)
        ):
            return None
        return lambda squeezed: fc2(relu(fc1(squeezed)))

    @torch.jit.unused
    def _gate_with_kernels(self, input: Tensor, excite: Callable[[Tensor], Tensor], overwrite: bool) -> Tensor:
        from composer_se import triton_gate  # Not above: Triton is not everywhere, and takes long to import.

        return triton_gate.squeeze_excite(input, excite, overwrite, self.layer_name)

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        return "" if self.inplace == "auto" else f"inplace={self.inplace}"


_MLP_CLASSES = (nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid)
_STANDARD_CLASSES = (nn.Conv2d, SqueezeExcite2d, nn.Sequential, *_MLP_CLASSES)


class SqueezeExciteConv2d(nn.Module):
    """A conv whose output is scaled by a Squeeze-and-Excitation block.

    Reads like the conv: attributes that it lacks (``weight``, ``out_channels``, ``stride``, ...) are the conv's, and
    setting them sets the conv's; only a parameter has to be assigned to the conv itself. A state dict of the bare conv
    loads into it, and the block keeps its weights.

    Args:
        *args: Arguments of `torch.nn.Conv2d`. Left out when ``conv`` is given.
        latent_channels: Hidden width of the block: a whole number >= 1, or a share of the conv's output channels in
            (0, 1). Default: ``0.125``.
        conv: The conv to wrap; the block takes its device, dtype and mode. Default: a new one, from the arguments.
        inplace: Whether the conv's output is overwritten by its scaled form, so that SE keeps no activation of its own.
            ``"auto"``: without gradients always, and while training if ``followed_by_norm``; in both cases only if
            nobody else can hold the conv's output. Default: ``"auto"``.
        followed_by_norm: Whether the output goes straight to a normalisation layer, which keeps its input and so never
            changes it in place. `composer_se.apply_squeeze_excite` finds out by itself. Default: ``False``.
        **kwargs: Keyword arguments of `torch.nn.Conv2d`.

    Raises:
        TypeError: If ``latent_channels`` is not a number, or both ``conv`` and arguments for a new one are given.
        ValueError: If ``latent_channels`` or ``inplace`` is out of range.

    Attributes:
        conv: The conv.
        se: Its `SqueezeExcite2d`.

    Shape:
        As the conv's.
    """

    def __init__(
        self,
        *args: Any,
        latent_channels: float = 0.125,
        conv: nn.Conv2d | None = None,
        inplace: bool | str = "auto",
        followed_by_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if conv is None:
            conv = nn.Conv2d(*args, **kwargs)
        elif args or kwargs:
            raise TypeError("Give either conv or the arguments of a new Conv2d, not both.")
        self.followed_by_norm = followed_by_norm
        self._known_untouched: tuple[int, tuple[nn.Module, ...]] | None = None
        self.conv = conv
        self.se = SqueezeExcite2d(
            conv.out_channels,
            latent_channels,
            inplace=inplace,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        self.train(conv.training)
        # The mark by which Composer's built-in algorithm knows a conv that has SE already.
        conv._already_squeeze_excited = True  # pyright: ignore[reportArgumentType]

    def forward(self, input: Tensor) -> Tensor:
        """The conv's output with every map scaled by its gate."""
        if torch.jit.is_scripting():
            return self.se(self.conv(input))
        return self._scale(input)

    @torch.jit.unused
    def _scale(self, input: Tensor) -> Tensor:
        # Not self.conv and self.se, which Python looks for in four places: 2 us per layer.
        conv: Any = self._modules["conv"]
        se: Any = self._modules["se"]
        if not torch.is_grad_enabled() and not ops.takes_plain_formula(input):
            weights = self._weights_if_untouched(conv, se)
            if weights is not None:
                # What conv(input) comes to, without the way there: 6 us per layer.
                u = conv._conv_forward(input, conv._parameters["weight"], conv._parameters["bias"])
                return se(u, True) if ops.takes_kernels(u) else ops.squeeze_excite_(u, *weights)
        # Whether the conv's output is surely ours, and will stay as the gate leaves it.
        may_overwrite = (
            (self.followed_by_norm or not torch.is_grad_enabled())
            and _returns_fresh_tensor(conv)
            and _is_untouched(se, SqueezeExcite2d)
            and not any(_GLOBAL_HOOKS)
        )
        return se(conv(input), may_overwrite)

    def _weights_if_untouched(self, conv: nn.Module, se: nn.Module) -> tuple[Tensor, Tensor] | None:
        """The MLP's weights, if they and the conv's are all that forward passes without gradients need.

        That is, if ``inplace`` allows to overwrite, and calling conv, block and the parts of the MLP would do what
        their classes do and nothing more. At batch 1 caches are cold and each object looked at costs: hooks and classes
        are looked at again only after a hook was registered somewhere or a module was replaced.
        """
        if type(se) is not SqueezeExcite2d or se.inplace is False:
            return None
        mlp: Any = se._modules["pool_and_mlp"]
        modules: tuple[Any, ...] = (conv, se, mlp, *mlp._modules.values())
        known = RemovableHandle.next_id, modules  # the former counts all hooks ever registered
        if known != self._known_untouched:
            if any(_GLOBAL_HOOKS) or tuple(map(type, modules)) != _STANDARD_CLASSES or any(map(_has_hooks, modules)):
                return None
            self._known_untouched = known
        for module in modules:
            if "forward" in module.__dict__:
                return None
        # Parametrisation changes a module's class and registers no hook; quantisation and sharding put tensors of their
        # own classes in.
        fc1, fc2 = modules[5], modules[7]
        if not (type(conv) is nn.Conv2d and type(fc1) is type(fc2) is nn.Linear):
            return None
        of_conv, of_fc1, of_fc2 = conv._parameters, fc1._parameters, fc2._parameters
        if of_fc1["bias"] is not None or of_fc2["bias"] is not None:
            return None
        w1, w2 = of_fc1["weight"], of_fc2["weight"]
        return (w1, w2) if type(of_conv["weight"]) is type(w1) is type(w2) is nn.Parameter else None

    def __getstate__(self) -> dict[str, Any]:
        # Copied and unpickled modules find out anew: what is true of the hooks here need not be there.
        return {**self.__dict__, "_known_untouched": None}

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


def _is_untouched(module: nn.Module | None, module_class: type[ModuleT]) -> TypeGuard[ModuleT]:
    """Whether calling ``module`` does what ``module_class`` does and nothing more."""
    return (
        module is not None
        and type(module) is module_class
        and "forward" not in module.__dict__
        and not _has_hooks(module)
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _returns_fresh_tensor(conv: nn.Module) -> bool:
    """Whether nobody but the caller can hold the output of ``conv``.

    Subclasses with a ``forward`` of their own may return a tensor that they keep, hooks may store it, and hooks on the
    backward pass make a view of it. Parametrised convs are `torch.nn.Conv2d` in this respect.
    """
    if not isinstance(conv, nn.Conv2d):
        return False
    conv_class = type(conv)
    return (
        conv_class.forward is nn.Conv2d.forward
        and conv_class._conv_forward is nn.Conv2d._conv_forward
        and "forward" not in conv.__dict__
        and not (conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks)
    )
