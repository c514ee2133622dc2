"""Finds a component's class by its name: all public classes of Composer, torch's optimizers, ours, the user's."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import torch.optim
from composer.algorithms.squeeze_excite.squeeze_excite import SqueezeExcite as ComposerSqueezeExcite
from composer.core import Algorithm, Callback

from composer_se.algorithm import SqueezeExcite
from composer_se.errors import UserError, did_you_mean
from composer_se.gate_monitor import GateMonitor
from composer_se.parts.own_parts import own_part

__all__ = ["components", "resolve"]

# Ours replace Composer's of the same name. Composer's gets another name, for comparisons.
_OURS = {
    "algorithms": {"squeeze_excite": SqueezeExcite, "composer_squeeze_excite": ComposerSqueezeExcite},
    "callbacks": {"gate_monitor": GateMonitor},
}

# The modules that hold the public classes of a section, and the classes' common base.
_SOURCES = {
    "algorithms": ((composer.algorithms,), Algorithm),
    "callbacks": ((composer.callbacks,), Callback),
    "loggers": ((composer.loggers,), composer.loggers.LoggerDestination),
    "optimizer": ((torch.optim, composer.optim), torch.optim.Optimizer),
    "scheduler": ((composer.optim,), composer.optim.ComposerScheduler),
}

# What the user's own function or class must return.
_EXPECTED = {
    "algorithms": "a composer.Algorithm",
    "callbacks": "a composer.Callback",
    "loggers": "a composer.loggers.LoggerDestination",
    "optimizer": "a torch.optim.Optimizer",
    "scheduler": "a scheduler, called with (state, ssr)",
}

# Suffixes that a recipe may leave out: `wandb` for `wandb_logger`.
_SUFFIXES = {"callbacks": "callback", "loggers": "logger", "scheduler": "scheduler"}


@functools.cache
def components(section: str) -> dict[str, type]:
    """All classes of a section by their canonical snake_case name.

    Args:
        section: `algorithms`, `callbacks`, `loggers`, `optimizer` or `scheduler`.

    Returns:
        The classes by name. The name is that of the class's module if the class has one to itself (`randaugment`,
        `ghost_batchnorm`), else the class's name in snake_case.
    """
    modules, base = _SOURCES[section]
    found: dict[str, type] = {}
    for module in modules:
        for cls in filter(inspect.isclass, (getattr(module, name) for name in module.__all__)):
            if issubclass(cls, base) and cls is not base:
                found[_canonical_name(cls, section)] = cls
    return found | _OURS.get(section, {})


def resolve(section: str, name: str, path: str) -> Callable[..., Any]:
    """The class that a name stands for, or the user's function that makes a component.

    Args:
        section: The section, as `components` takes it.
        name: The component's name, or `package.module:name` of the user's own. Underscores and a suffix that repeats
            the section make no difference: `mixup`, `mix_up`; `cosine_annealing`, `cosine_annealing_scheduler`.
        path: The key path of the name, for the message.

    Raises:
        UserError: If there is no such component, or the user's module can't be imported.
    """
    if ":" in name:
        return own_part(name, path, _EXPECTED[section], lambda made: _fits(made, section))
    known = components(section)
    by_spelling = {}
    for canonical, cls in known.items():
        for spelling in _spellings(canonical, section):
            by_spelling[spelling] = cls
    wanted = _squash(name)
    if wanted not in by_spelling:
        singular = section.removesuffix("s")
        hint = "; every number is in RUN_FOLDER/metrics.jsonl without any logger" if section == "loggers" else ""
        raise UserError(f"{path}: unknown {singular} {name!r}{did_you_mean(name, known)}{hint}")
    return by_spelling[wanted]


def _fits(made: Any, section: str) -> bool:
    """True if an object can be used in a section. Any function of two arguments is a scheduler."""
    if section != "scheduler":
        return isinstance(made, _SOURCES[section][1])
    try:
        inspect.signature(made).bind("state", 1.0)
    except (TypeError, ValueError):  # it can't be called, or not with these
        return False
    return True


def _canonical_name(cls: type, section: str) -> str:
    module = cls.__module__.rpartition(".")[2]
    suffix = _SUFFIXES.get(section, "")
    if _squash(module) in (_squash(cls.__name__), _squash(cls.__name__).removesuffix(suffix)):
        return module
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-zA-Z])", "_", cls.__name__).lower().removesuffix(f"_{suffix}")


def _spellings(canonical: str, section: str) -> set[str]:
    squashed, suffix = _squash(canonical), _SUFFIXES.get(section, "")
    return {squashed, squashed.removesuffix(suffix), squashed.removesuffix(suffix) + suffix}


def _squash(name: str) -> str:
    return name.replace("_", "").lower()
