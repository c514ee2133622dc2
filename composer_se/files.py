"""Writing files so that a full disk costs one line and no finished file."""

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
    """Turns a write that fails into one line. Use it around the write.

    Raises:
        UserError: The write failed.
    """
    try:
        yield
    except OSError as error:
        raise failed_write(path, error, path.parent) from error


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file such that it is, whatever happens, either the new one or the one before.

    Raises:
        UserError: The write failed.
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
    """The complaint about a file that can't be written. The same command continues from `origin`, or begins again."""
    reason = error.strerror or one_line(error)
    with contextlib.suppress(OSError):
        reason += f"; {shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder}"
    remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "change that"
    again = f"the same command continues from {origin}" if origin else "give the same command again"
    return UserError(f"{path}: can't be written ({reason}); {remedy}, and {again}")
