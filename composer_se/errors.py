"""The error whose one line is all the user needs."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """Something the user can put right: a command prints its message in one line and exits with code 2.

    The message names the thing (full key path or option), the value, what was expected and what to do. Line breaks in
    it, which a hostile key or value can bring along, become spaces.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())
