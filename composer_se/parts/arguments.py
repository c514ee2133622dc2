"""Checks the arguments of a component against the signature of what will be called with them."""

from __future__ import annotations

import collections.abc
import enum
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from composer_se.errors import UserError, did_you_mean, one_line

__all__ = ["argument_blamed", "check_arguments", "construct", "signature", "type_hints"]


def check_arguments(
    target: Callable[..., Any], given: Mapping[str, Any], path: str, supplied: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Checks names and types of arguments, and converts values to the annotated types.

    Most YAML readers return `1e-4` as a string, so such a string becomes a number. A list becomes a tuple, a number a
    string, a string a `Path`, and a value a member of an enumeration, where the annotation asks for it.

    Args:
        target: The class or function that will be called.
        given: Arguments by name.
        path: The key path of the arguments' section, for the messages.
        supplied: Names of arguments that the caller adds, and that the user must not give.

    Returns:
        The converted arguments.

    Raises:
        UserError: If a name is unknown, a required argument is missing, or a value can't be converted.
    """
    parameters = signature(target).parameters
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in supplied
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    hints = type_hints(target)
    converted = {}
    for name, value in given.items():
        if not isinstance(name, str) or (name not in named and (not takes_any or name in supplied)):
            raise UserError(f"{path}.{name}: unknown argument of {_name(target)}{did_you_mean(str(name), named)}")
        hint = hints.get(name, Any)
        try:
            converted[name] = _convert(value, hint)
        except ValueError:
            raise UserError(f"{path}.{name}: expected {_spell(hint)}, got {value!r}") from None
    for name, parameter in named.items():
        # torch marks required arguments of optimizers by a sentinel default.
        required = parameter.default is parameter.empty or repr(parameter.default) == "<required parameter>"
        if required and name not in given:
            raise UserError(f"{path}.{name}: required by {_name(target)}, but the recipe doesn't set it")
    return converted


def construct(target: Callable[..., Any], path: str, /, *args: Any, **kwargs: Any) -> Any:
    """Calls `target`. If it raises an error about a value, raises a `UserError` that names the key path."""
    try:
        return target(*args, **kwargs)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, OSError, RuntimeError, AssertionError) as error:
        message = one_line(error) or type(error).__name__
        raise UserError(f"{path}{argument_blamed(message, kwargs)}: {message}") from error


def argument_blamed(message: str, arguments: Mapping[str, Any]) -> str:
    """Returns ``.NAME`` for the argument that an error message is about, or nothing if the message does not show it.

    The message begins with the argument's name, or is one of torch's ("Invalid learning rate: -1") and holds the name
    or the value of one argument only.
    """
    blamed = [name for name in arguments if re.match(rf"`?{re.escape(name)}\b", message)]
    if not blamed and message.startswith("Invalid"):
        words = set(re.findall(r"-?[\w.]+", message))
        blamed = [name for name in arguments if name in words]
        if not blamed:
            values = {name: value if isinstance(value, tuple) else (value,) for name, value in arguments.items()}
            blamed = [name for name in values if words & set(map(str, values[name]))]
    return f".{blamed[0]}" if len(blamed) == 1 else ""


def signature(target: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function or a class. If Python doesn't know it, one that takes any arguments."""
    if inspect.isclass(target) and _inherits_catch_all(target):
        return inspect.Signature()
    try:
        return inspect.signature(target)
    except ValueError:  # of some builtins
        return inspect.signature(lambda **any_arguments: None)


def _inherits_catch_all(cls: type) -> bool:
    """True for a class that inherits a constructor which ignores its arguments, like that of Composer's Callback."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
    return owner is not cls and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotated types of a function's or a class's arguments, as far as they can be resolved."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # annotations that name what is imported for type checkers only
        return {}


def _name(target: Callable[..., Any]) -> str:
    return getattr(target, "__name__", str(target))


def _convert(value: Any, hint: Any) -> Any:
    """The value as the hinted type; ValueError where there is no faithful conversion."""
    if hint is Any:  # the constructor decides
        return value
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint))
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        raise ValueError
    plain = origin or hint
    if plain in (bool, int, float, str, type(None)):
        return _convert_scalar(value, plain)
    if plain is Path:
        return Path(_convert_scalar(value, str))
    if plain in (tuple, list, collections.abc.Sequence, collections.abc.Iterable):
        return _convert_sequence(value, plain, typing.get_args(hint))
    if inspect.isclass(plain) and issubclass(plain, enum.Enum):
        try:
            return plain(value)
        except TypeError:  # Composer's enumerations raise it for what is not a string
            raise ValueError from None
    if inspect.isclass(plain) and plain is not object:
        # A mapping; or a class that YAML can't write, such as a Tensor, a function or an object store.
        if isinstance(value, plain):
            return value
        raise ValueError
    return value


def _convert_union(value: Any, arms: tuple[Any, ...]) -> Any:
    for arm in arms:  # a value that is already of one of the types stays what it is
        if arm is Any or type(value) is (typing.get_origin(arm) or arm):
            return _convert(value, arm)
    # A string is the last resort, and not where a number was meant: 3.5 is no "whole number or string".
    numeric = any(arm in (int, float) for arm in arms)
    for arm in sorted(arms, key=lambda arm: arm is str):
        if arm is str and numeric and not isinstance(value, str):
            continue
        try:
            return _convert(value, arm)
        except ValueError:
            continue
    raise ValueError


def _convert_sequence(value: Any, plain: Any, arms: tuple[Any, ...]) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError
    if plain is tuple and arms and arms[-1] is not Ellipsis:
        if len(arms) != len(value):
            raise ValueError
        return tuple(_convert(item, arm) for item, arm in zip(value, arms, strict=True))
    items = [_convert(item, arms[0] if arms else Any) for item in value]
    return tuple(items) if plain is tuple else items


def _convert_scalar(value: Any, scalar: type) -> Any:
    if scalar in (bool, type(None)):
        if isinstance(value, scalar):
            return value
    elif not isinstance(value, bool) and isinstance(value, (int, float, str)):
        if scalar is str:
            return str(value)
        # An int stays an int, also for float: 64 may mean another thing than 64.0.
        number = value if isinstance(value, int) else float(value)
        if scalar is int and float(number).is_integer():
            return int(number)
        if scalar is float and math.isfinite(number):
            return number
    raise ValueError


def _spell(hint: Any) -> str:
    """A type as a user would name it."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(hint) if arm is not torch.Tensor]  # which YAML can't write
        return " or ".join(dict.fromkeys(map(_spell, arms)))
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(hint))
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(repr(member.value) for member in hint)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}
    names |= {tuple: "a list", list: "a list", dict: "a mapping"}
    plain = origin or hint
    if plain is tuple and Ellipsis not in typing.get_args(hint) and typing.get_args(hint):
        return f"a list of {len(typing.get_args(hint))}"
    return names.get(plain, getattr(plain, "__name__", str(plain)))
