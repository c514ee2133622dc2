"""Writes files so that a full disk gives a one-line error and destroys no finished file."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from composer_se.errors import UserError, one_line

__all__ = ["failed_write", "replace_file", "writing"]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises a one-line error if the write inside the `with` fails.

    Raises:
        UserError: If the write failed.
    """
    try:
        yield
    except OSError as error:
        raise failed_write(path, error, path.parent) from error


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file. If that fails, the old file stays.

    Raises:
        UserError: If the write failed.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def failed_write(path: Path, error: OSError, folder: Path, origin: str = "") -> UserError:
    """Returns the error for a file that can't be written. It tells the user to repeat the command."""
    reason = error.strerror or one_line(error)
    with contextlib.suppress(OSError):
        reason += f"; {shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder}"
    remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "change that"
    again = f"the same command continues from {origin}" if origin else "give the same command again"
    return UserError(f"{path}: can't be written ({reason}); {remedy}, and {again}")
