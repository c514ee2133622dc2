"""A disk that is full or out of order while a run writes: one line instead of a traceback, and nothing lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

from composer_se.errors import UserError
from composer_se.recipe.checkpoints import LATEST
from composer_se.recipe.messages import one_line

__all__ = ["explain_failed_write", "remove_unfinished_checkpoint", "replace_file", "writing"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around a write to a file of the run folder.

    Raises:
        UserError: The write failed.
    """
    try:
        yield
    except OSError as error:
        raise UserError(_complaint(path, error, path.parent)) from error


def replace_file(path: Path, text: str) -> None:
    """Writes a file such that it is, whatever happens, either the new one or the one before.

    Raises:
        UserError: The write failed.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def explain_failed_write(error: BaseException, run_folder: Path) -> str | None:
    """What to tell of an error that came out of training, if it is that a file can't be written.

    Where the file is a checkpoint, the part of it that was written is deleted. Composer makes `latest-rank0.pt` point
    to a checkpoint only when it is complete, so the one before is still what the run resumes from.

    Returns:
        One line that names the file, the reason and the room that is left; None when the error is another one.
    """
    cause = next((link for link in _chain(error) if isinstance(link, OSError) and link.errno), None)
    if cause is None:
        return None
    checkpoint = remove_unfinished_checkpoint(error)
    if checkpoint:
        latest = checkpoint.parent / LATEST
        origin = f"{latest.resolve().name}, which is intact" if latest.exists() else "the start"
        return _complaint(checkpoint, cause, checkpoint.parent, origin)
    if cause.errno in _FULL:
        return _complaint(Path(os.fsdecode(cause.filename)) if cause.filename else run_folder, cause, run_folder)
    return None


def remove_unfinished_checkpoint(error: BaseException) -> Path | None:
    """Deletes the checkpoint whose writing an error or a signal cut short.

    It has to go: torch.save closes the file even then, so that it looks whole, but parts of it are missing.

    Returns:
        Its path; None if no checkpoint was being written.
    """
    for link in _chain(error):
        for frame, _ in traceback.walk_tb(link.__traceback__):
            if frame.f_code.co_name == "_write_checkpoint_file":
                checkpoint = Path(frame.f_locals["filename"])
                checkpoint.unlink(missing_ok=True)
                return checkpoint
    return None


def _complaint(path: Path, error: OSError, folder: Path, origin: str = "the last checkpoint") -> str:
    reason = error.strerror or one_line(error)
    with contextlib.suppress(OSError):
        reason += f"; {shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder}"
    return f"{path}: can't be written ({reason}); make room, and the same command continues from {origin}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those before it: torch.save covers the failure of a write with a complaint of its own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
