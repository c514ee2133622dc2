"""Imports the user's own parts by name: `package.module:name`, also from the current folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer_se.errors import UserError, did_you_mean, one_line
from composer_se.parts.arguments import signature, type_hints

__all__ = ["own_part"]


def own_part(name: str, path: str, expected: str, fits: Callable[[Any], bool]) -> Callable[..., Any]:
    """Imports a function or class of the user's.

    Args:
        name: `package.module:name`.
        path: The recipe's key that holds the name, such as ``model.name``. Error messages start with it.
        expected: The kind of object that the function or class must return, for the message.
        fits: Returns True for an object of the expected kind.

    Returns:
        A function with the signature of the user's. It raises a `UserError` if the user's fails or returns an object of
        another kind.

    Raises:
        UserError: If the module can't be imported, or holds no such function or class.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # Python does not search the current folder for a console script
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise UserError(
            f"{path}: {name}: module {module_name!r} can't be imported ({type(error).__name__}: {one_line(error)}); "
            "modules are looked for in the current folder, on PYTHONPATH and among what is installed"
        ) from error
    make: Any = getattr(module, attribute, None)
    if not callable(make):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f"{path}: {name}: module {module_name!r} has no function or class {attribute!r}"
            f"{did_you_mean(attribute, own)}"
        )

    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            made = make(*args, **kwargs)
        except Exception as error:  # whatever the user's function does
            raise UserError(f"{path}: {name} fails ({type(error).__name__}: {one_line(error)})") from error
        if not fits(made):
            raise UserError(f"{path}: {name} returned a {type(made).__name__}, expected {expected}")
        return made

    checked.__name__ = name
    checked.__signature__ = signature(make)  # type: ignore[attr-defined]
    checked.__annotations__ = type_hints(make)
    return checked
