"""What ends training before its time: a signal, or a file that can't be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from composer_se.errors import UserError
from composer_se.recipe.failed_writes import explain_failed_write, remove_unfinished_checkpoint

__all__ = ["exit_code_of"]

# What shells report of SIGINT and SIGTERM, and what Composer's handlers exit with.
_INTERRUPTED = (130, 143)


def exit_code_of(work: Callable[[], object], folder: Path) -> int:
    """Does work that trains, and tells a signal from a failure.

    Args:
        work: What to do.
        folder: Where it writes, for the complaint.

    Returns:
        0 when it came to its end, 130 or 143 when SIGINT or SIGTERM came before.

    Raises:
        UserError: A file could not be written.
    """
    try:
        work()
    except (OSError, RuntimeError, KeyboardInterrupt, SystemExit) as error:
        code = _interruption_behind(error)
        if code is not None:
            remove_unfinished_checkpoint(error)
            return code
        if isinstance(error, SystemExit):
            raise
        complaint = explain_failed_write(error, folder)
        if complaint is None:
            raise
        raise UserError(complaint) from error
    return 0


def _interruption_behind(error: BaseException | None) -> int | None:
    """The exit code of the signal behind an error: one that came while a file was written makes its writer complain."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return 130
        if isinstance(error, SystemExit) and error.code in _INTERRUPTED:  # Composer turns signals into these
            return int(error.code)
        error = error.__context__
    return None
