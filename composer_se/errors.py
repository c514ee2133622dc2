"""The error that commands show to the user in one line, and the wording of its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "did_you_mean", "one_line"]


class UserError(Exception):
    """An error that the user can fix: a command prints its message in one line and exits with code 2.

    The message names the thing (full key path or option), the value, what was expected and what to do. Line breaks,
    which a key or value may contain, become spaces.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if text.startswith("Caught UserError in DataLoader worker"):  # torch puts the worker's traceback before it
            text = text.rpartition("UserError: ")[2]
        return " ".join(text.splitlines())


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Suggests the nearest valid name; lists all names if none is near and there are at most 20.

    Args:
        name: The user's word.
        valid: The valid names.

    Returns:
        The end of a sentence, such as `"; did you mean 'momentum'?"`.
    """
    names = sorted(valid)
    if not names:
        return "; it takes none"
    begun = [known for known in names if name and known.startswith(name)]
    nearest = begun or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    if len(names) <= 20:
        return f"; valid names are {', '.join(names)}"
    loosest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"; the nearest of {len(names)} valid names is {loosest[0]!r}"


def one_line(error: BaseException | str) -> str:
    """The message of an error with its line breaks and indentation folded into single spaces."""
    return " ".join(str(error).split())
