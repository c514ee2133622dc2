"""The wording shared by all complaints about a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "one_line"]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Says which valid name is nearest, and all of them when there are few.

    Args:
        name: What the user wrote.
        valid: The names that would have been accepted.

    Returns:
        The end of a sentence, such as `"; did you mean 'momentum'?"`.
    """
    names = sorted(valid)
    if not names:
        return "; it takes none"
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    if len(names) <= 20:
        return f"; valid names are {', '.join(names)}"
    loosest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"; the nearest of {len(names)} valid names is {loosest[0]!r}"


def one_line(error: BaseException | str) -> str:
    """The message of an error with its line breaks and indentation folded into single spaces."""
    return " ".join(str(error).split())
