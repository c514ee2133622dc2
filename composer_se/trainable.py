"""Trains a part of a model: freezes the other parameters, and the norms they belong to."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from composer_se import surgery
from composer_se.modules import SqueezeExcite2d
from composer_se.options import as_patterns
from composer_se.selection import check_not_wrapped, is_norm, match_pattern, without_prefix

__all__ = ["train_only"]


def train_only(
    model: nn.Module, patterns: str | Sequence[str], optimizers: Optimizer | Sequence[Optimizer] | None = None
) -> dict[str, Parameter]:
    """Lets only some parameters of a model train, in place. Call it again to choose others; ``"*"`` chooses all.

    The other parameters get no gradient, and the optimizers drop them with their state. A norm that has none of the
    chosen parameters keeps its running statistics and stays in evaluation mode under ``model.train()``. Everything else
    stays in the model's mode, dropout for instance. An earlier ``requires_grad`` does not count.

    Args:
        model: The model, after all surgery and before DDP or FSDP wraps it.
        patterns: Glob pattern, or several, over qualified parameter names. A module's name stands for all parameters
            below it, and a leading ``module.`` may be left out. Three words have a meaning of their own: ``"se"`` is
            every block of this package; ``"norms"`` is every normalisation layer; ``"head"`` is the classifier: timm's
            ``get_classifier()``, or the last Linear or Conv2d in order of registration. For a module that has such a
            name write ``"head.*"``. A norm without parameters follows its name.
        optimizers: The optimizers of the model's parameters, if they exist already. A chosen parameter that no
            optimizer holds joins the first group of the first optimizer. Default: none.

    Returns:
        The parameters that train, by qualified name, in model order.

    Raises:
        TypeError: If an argument has the wrong type, or the model is wrapped in DDP or FSDP.
        ValueError: If a pattern matches no parameter, nothing would train, or an optimizer holds none of the model's
            parameters. The model and the optimizers are as before.

    Example:
        >>> from torchvision.models import resnet50
        >>> sorted(train_only(resnet50(), ["layer4.2.bn3", "head"]))
        ['fc.bias', 'fc.weight', 'layer4.2.bn3.bias', 'layer4.2.bn3.weight']
    """
    check_not_wrapped(model)
    surgery.check_optimizers(model, optimizers)
    chosen = _chosen(model, as_patterns(patterns, "patterns") or ())
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in names if parameter in chosen]
    if not trained:
        raise ValueError('Nothing would train: give a pattern that matches a parameter, such as "head".')

    for parameter in names:
        parameter.requires_grad_(parameter in chosen)
        if parameter not in chosen:
            parameter.grad = None
    for module in model.modules():
        if is_norm(module) and (parts := {*_own_parts(module)}):
            _set_frozen(module, chosen.isdisjoint(parts), model.training)
    if optimizers is not None:
        surgery.limit_optimizers(model, chosen, optimizers)
    return {names[parameter]: parameter for parameter in trained}


_Part = Parameter | nn.Module
"""A parameter, or a norm that has running statistics and no parameter."""


def _chosen(model: nn.Module, patterns: Sequence[str]) -> set[_Part]:
    names: dict[_Part, list[str]] = {}
    parts = *model.named_parameters(remove_duplicate=False), *model.named_modules(remove_duplicate=False)
    for name, part in parts:
        if isinstance(part, Parameter) or _is_bare_norm(part):
            names.setdefault(part, []).append(name)
    chosen: set[_Part] = set()
    for pattern in patterns:
        if pattern in _WORDS:
            meaning, find = _WORDS[pattern]
            found = set(find(model))
            fault = f"{pattern!r} stands for {meaning}, and the model has none."
        else:
            found = {part for part in names if match_pattern((pattern,), names[part])}
            fault = f"{pattern!r} matches no parameter of the model. Nearest names: {_nearest(model, pattern)}."
        if not found:
            raise ValueError(fault)
        chosen |= found
    return chosen


def _nearest(model: nn.Module, pattern: str) -> str:
    modules = (name for name, part in model.named_modules() if name not in ("", "module") and [*part.parameters()])
    names = (*modules, *(name for name, _ in model.named_parameters()))
    known = [*_WORDS, *map(without_prefix, names)]
    return ", ".join(difflib.get_close_matches(without_prefix(pattern), known, n=3, cutoff=0.3) or known[:3])


def _blocks(model: nn.Module) -> Iterator[Parameter]:
    for module in model.modules():
        if isinstance(module, SqueezeExcite2d):
            yield from module.parameters()


def _norms(model: nn.Module) -> Iterator[_Part]:
    for module in model.modules():
        if is_norm(module):
            yield from _own_parts(module)


def _head(model: nn.Module) -> Iterable[Parameter]:
    for owner in (model, getattr(model, "module", None)):  # the Trainer's model keeps the network under this name
        find = getattr(owner, "get_classifier", None)
        if callable(find):
            found = find()
            layers = found if isinstance(found, (tuple, list)) else [found]
            break
    else:
        inside = {part for block in model.modules() if isinstance(block, SqueezeExcite2d) for part in block.modules()}
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m not in inside][-1:]
    return [p for layer in layers if isinstance(layer, nn.Module) for p in layer.parameters()]


_WORDS: dict[str, tuple[str, Callable[[nn.Module], Iterable[_Part]]]] = {
    "se": ("the Squeeze-and-Excitation blocks of composer-se", _blocks),
    "norms": ("the normalisation layers", _norms),
    "head": ("the classifier", _head),
}


def _own_parts(module: nn.Module) -> list[_Part]:
    """The parameters of a module without those of its children. A norm without parameters yields itself."""
    return [module] if _is_bare_norm(module) else [*module.parameters(recurse=False)]


def _is_bare_norm(module: nn.Module) -> bool:
    # Not by its class alone: torchvision's Conv2dNormActivation is a container.
    has_statistics = getattr(module, "running_var", None) is not None
    return is_norm(module) and has_statistics and next(module.parameters(recurse=False), None) is None


def _set_frozen(norm: nn.Module, frozen: bool, training: bool) -> None:
    # An attribute of the instance comes before the method of its class, and goes along into copies and pickles.
    if frozen:
        norm.__dict__["train"] = functools.partial(_stay_in_evaluation, norm)
        norm.train()
    elif getattr(norm.__dict__.get("train"), "func", None) is _stay_in_evaluation:
        del norm.__dict__["train"]
        norm.train(training)


def _stay_in_evaluation(norm: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces the method ``train`` of a frozen norm. The norm's children, such as an activation, get the mode."""
    type(norm).train(norm, mode)
    norm.training = False
    return norm
