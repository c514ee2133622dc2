"""Chooses the convs that get Squeeze-and-Excitation, with a reason for each conv and the width of its block."""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from composer_se.modules import SqueezeExciteConv2d
from composer_se.norm_module import SqueezeExciteNorm2d
from composer_se.options import RECOMMENDED_MIN_CHANNELS, SqueezeExciteOptions, latent_width
from composer_se.wrapper import SqueezeExcited

__all__ = ["ConvChoice", "Selection", "select_convs"]

HAS_SE = "has SE already"

_SE_CLASS = re.compile(
    r"(effective)?(e?se|squeeze_?(and)?_?excit(e|ation)|gather_?excite|channel_?att(entio)?n|globalcontext)"
    r"(2d|cl|module|layer|block|unit)?",
    re.IGNORECASE,
)
_ATTENTION_CLASS = re.compile(r"attn|attention", re.IGNORECASE)
_POOL_CLASS = re.compile(r"(global|adaptive)\w*pool", re.IGNORECASE)


@dataclass(frozen=True)
class ConvChoice:
    """The decision on one conv.

    Attributes:
        name: Qualified name, the first one in model order for a conv that several modules share.
        conv: The conv.
        chosen: True if the conv gets a block.
        reason: The reason, in a few words.
        latent_channels: Hidden width of the block that the conv has or gets; 0 for none.
        norm: The norm that follows the conv, or None.
        too_narrow: True if the number of channels alone keeps the conv from a block.
    """

    name: str
    conv: nn.Conv2d
    chosen: bool
    reason: str
    latent_channels: int
    norm: nn.Module | None
    too_narrow: bool = False


@dataclass(frozen=True)
class Selection:
    """The choice for every conv of a model, in model order.

    Attributes:
        choices: One entry per conv.
        min_channels: The threshold in force, with ``"auto"`` resolved.
    """

    choices: tuple[ConvChoice, ...]
    min_channels: int

    @property
    def chosen(self) -> tuple[ConvChoice, ...]:
        """The convs that get a block."""
        return tuple(choice for choice in self.choices if choice.chosen)


def select_convs(model: nn.Module, options: SqueezeExciteOptions) -> Selection:
    """Chooses the convs of a model that get a Squeeze-and-Excitation block. Changes nothing.

    Skips a conv that has a block already, that is part of an existing SE block or works on the 1×1 map after a global
    pool, that the patterns exclude, or that has too few channels; the first of these is the reason given.

    Args:
        model: The model.
        options: The options that choose the convs.

    Returns:
        The choice for every `torch.nn.Conv2d`.

    Raises:
        TypeError: If the model is wrapped in DDP or FSDP.
        ValueError: If a pattern matches no conv, the model is itself a conv, or ``placement`` is "norm" and no norm
            follows a chosen conv.
    """
    include, exclude = tuple(options.include or ()), tuple(options.exclude or ())
    _check_model(model)
    names = _conv_names(model)
    _check_patterns(include, "include", names)
    _check_patterns(exclude, "exclude", names)
    norms = following_norms(model)
    attached = _convs_with_block(model, norms)
    unsuited = _unsuited_convs(model)

    def count(conv: nn.Conv2d) -> int:
        of_output = options.min_channels_of == "output"
        return conv.out_channels if of_output else min(conv.in_channels, conv.out_channels)

    def why_not(conv: nn.Conv2d) -> str | None:
        if conv in attached or getattr(conv, "_already_squeeze_excited", False):
            return HAS_SE
        if conv in unsuited and not any(without_prefix(name) in map(without_prefix, include) for name in names[conv]):
            return unsuited[conv]
        if include and not match_pattern(include, names[conv]):
            return "matches no include pattern"
        if excluding := match_pattern(exclude, names[conv]):
            return f"excluded by {excluding!r}"
        return None

    reasons = {conv: why_not(conv) for conv in names}
    if options.min_channels == "auto":
        # Includes convs that have a block, so that a second call with the same options has the same threshold.
        largest = max((count(conv) for conv, reason in reasons.items() if reason in (None, HAS_SE)), default=1)
        threshold = min(RECOMMENDED_MIN_CHANNELS, largest)
    else:
        threshold = int(options.min_channels)

    def choose(conv: nn.Conv2d) -> ConvChoice:
        reason, width = reasons[conv], attached.get(conv, 0)
        if too_narrow := reason is None and count(conv) < threshold:
            reason = f"{count(conv)} channels < {threshold}"
        elif reason is None:
            width = latent_width(options.latent_channels, conv.out_channels)
        return ConvChoice(names[conv][0], conv, reason is None, reason or "chosen", width, norms.get(conv), too_narrow)

    choices = tuple(choose(conv) for conv in names)
    if options.placement == "norm":
        _check_norms(choices)
    return Selection(choices, threshold)


def _check_model(model: nn.Module) -> None:
    if isinstance(model, nn.Conv2d):
        raise ValueError(
            "The model is itself a Conv2d, which can't be replaced in place. "
            "Wrap it by hand: SqueezeExciteConv2d(conv=model)."
        )
    check_not_wrapped(model)


def check_not_wrapped(model: nn.Module) -> None:
    """Checks that no part of a model is wrapped for distributed training yet.

    Raises:
        TypeError: If the model or a submodule is wrapped in DistributedDataParallel or FSDP.
    """
    # Looked up, not imported: a model can't be wrapped by a module that nobody imported.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrappers = (
        DistributedDataParallel,
        *(getattr(fsdp, name, ()) for name in ("FullyShardedDataParallel", "FSDPModule")),
    )
    for name, module in model.named_modules():
        if isinstance(module, wrappers):
            raise TypeError(
                f"{name or 'The model'} is wrapped in {type(module).__name__}, which has registered its parameters "
                "already. Give the bare model, then wrap it."
            )


def _conv_names(model: nn.Module) -> dict[nn.Conv2d, list[str]]:
    """Every conv in model order, with all its qualified names."""
    names: dict[nn.Conv2d, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d):
            names.setdefault(module, []).append(name)
    return names


def _convs_with_block(model: nn.Module, norms: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, int]:
    """The convs that have a block of ours, after the conv or its norm, each with the block's width."""
    wrappers = (module for module in model.modules() if isinstance(module, SqueezeExciteConv2d))
    widths = {conv: wrapper.se.latent_channels for wrapper in wrappers for conv in wrapper.conv.modules()}
    return widths | {conv: n.se.latent_channels for conv, n in norms.items() if isinstance(n, SqueezeExciteNorm2d)}


def _check_norms(choices: Sequence[ConvChoice]) -> None:
    chosen = (choice for choice in choices if choice.chosen)
    without = [without_prefix(c.name) for c in chosen if c.norm is None or _is_channels_last(c.norm)]
    if without:
        raise ValueError(
            f'placement is "norm", but no norm of maps follows {len(without)} of the chosen convs '
            f"({', '.join(without[:3])}{', …' if len(without) > 3 else ''}). Leave them out with exclude, or set "
            'placement="conv".'
        )


def _is_channels_last(norm: nn.Module) -> bool:
    """True if a norm takes (N, H, W, C), as ConvNeXt's do: a block after it would take rows for channels."""
    # Both LayerNorm2d, timm's and torchvision's, take (N, C, H, W).
    of_channels = isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1
    return of_channels and "2d" not in type(norm).__name__


def _unsuited_convs(model: nn.Module) -> dict[nn.Module, str]:
    """The convs whose input has one number per channel instead of a map, each with the reason to give."""
    reasons: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        label = f"{type(module).__name__} {name}" if name else type(module).__name__
        if is_se_block(module):
            for conv in _convs_in(module):
                reasons.setdefault(conv, f"inside the SE block {label}")
        if _ATTENTION_CLASS.search(type(module).__name__):
            for child_name, child in module.named_children():
                if child_name.startswith("fc") and _is_pointwise(child):
                    reasons.setdefault(child, f"on the 1×1 map of {label}")
        for conv in _convs_after_global_pool(module):
            reasons.setdefault(conv, "on the 1×1 map after a global pool")
    return reasons


def is_se_block(module: nn.Module) -> bool:
    """Recognises a Squeeze-and-Excitation block made of convs, by the name of its class or by its structure.

    By name, all its convs must be 1×1: a residual block called ``SEBlock`` holds others. By structure, its children are
    two 1×1 convs, from C channels to fewer and back to C, without normalisation, and a sigmoid.
    """
    if _SE_CLASS.fullmatch(type(module).__name__):
        return all(map(_is_pointwise, _convs_in(module)))
    children = list(module.children())
    convs = [child for child in children if isinstance(child, nn.Conv2d)]
    if len(convs) != 2 or not all(map(_is_pointwise, convs)):
        return False
    reduce, expand = convs
    return (
        expand.out_channels == reduce.in_channels > reduce.out_channels == expand.in_channels
        and any(isinstance(child, nn.Sigmoid | nn.Hardsigmoid) for child in children)
        and not any(map(is_norm, children))
    )


def is_norm(module: nn.Module) -> bool:
    """Recognises a normalisation layer: one of torch's, or one with "Norm" in the name of its class.

    Such a layer keeps its input for backward and does not change it. In-place activated batch norm (``InPlaceABN``)
    changes its input and does not count.
    """
    named_like_one = "Norm" in type(module).__name__ and not isinstance(module, SqueezeExcited)
    return named_like_one or isinstance(module, _NORMS)


def following_norms(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Maps each module to the norm registered next after it, if a norm comes next in every parent of the module."""
    successors: dict[nn.Module, list[nn.Module | None]] = {}
    for parent in model.modules():
        children = [child for child in parent._modules.values() if child is not None]
        for child, successor in zip(children, [*children[1:], None], strict=False):
            successors.setdefault(child, []).append(successor)
    return {
        module: after[0]
        for module, after in successors.items()
        if after[0] is not None and all(successor is not None and _normalises(successor) for successor in after)
    }


def _normalises(module: nn.Module) -> bool:
    return is_norm(module) or isinstance(module, SqueezeExciteNorm2d)


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def _convs_in(module: nn.Module) -> Iterator[nn.Conv2d]:
    return (child for child in module.modules() if isinstance(child, nn.Conv2d))


def _is_global_pool(module: nn.Module) -> bool:
    """Recognises a pool to one number per channel: torch's adaptive pools, and those named like them."""
    named_like_one = _POOL_CLASS.search(type(module).__name__) is not None
    return named_like_one and getattr(module, "output_size", 1) in (1, (1, 1))


def _convs_after_global_pool(parent: nn.Module) -> Iterator[nn.Conv2d]:
    """The convs registered after a global pool in the same parent, up to something that makes or needs larger maps.

    In a `torch.nn.Sequential` the order is that of the calls. In other parents it only suggests so, and a shortcut may
    come last: there a nested module counts only if its convs are 1×1 and without normalisation, as in classifiers.
    """
    in_order = isinstance(parent, nn.Sequential)
    pooled = False
    for child in parent.children():
        convs = list(_convs_in(child))
        if _is_global_pool(child):
            pooled = True
        elif isinstance(child, nn.Upsample) or (not in_order and not all(map(_is_pointwise, convs))):
            pooled = False
        elif pooled and (in_order or not any(map(is_norm, child.modules()))):
            yield from convs


def _check_patterns(patterns: tuple[str, ...], option: str, names: dict[nn.Conv2d, list[str]]) -> None:
    all_names = [without_prefix(name) for conv_names in names.values() for name in conv_names]
    for pattern in patterns:
        if match_pattern((pattern,), all_names) is None:
            nearest = difflib.get_close_matches(without_prefix(pattern), all_names, n=3, cutoff=0.3) or all_names[:3]
            raise ValueError(
                f"{option} has the pattern {pattern!r}, which matches no Conv2d of the model. "
                + (f"Nearest names: {', '.join(nearest)}." if nearest else "The model has no Conv2d.")
            )


def match_pattern(patterns: tuple[str, ...], names: Sequence[str]) -> str | None:
    """The first pattern that matches one of the qualified names, or a module around it; None if none does."""
    for pattern in patterns:
        bare = without_prefix(pattern)
        for name in map(without_prefix, names):
            if fnmatch.fnmatchcase(name, bare) or fnmatch.fnmatchcase(name, f"{bare}.*"):
                return pattern
    return None


def without_prefix(name: str) -> str:
    """A qualified name without the leading ``module.`` that wrappers add."""
    return name.removeprefix("module.")
