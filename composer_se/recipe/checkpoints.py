"""Finds damaged checkpoints and the newest whole one, and deletes unfinished ones.

Composer writes `ep{epoch}-ba{batch}-rank0.pt` under its final name, then removes the link `latest-rank0.pt` and makes
a new one. A run resumes from the file that the link points to. A kill or a full disk can leave an unfinished file. A
kill after the link was removed leaves no link. A crash of the machine can damage the file that the link points to.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path

from composer_se.errors import UserError, one_line
from composer_se.files import failed_write
from composer_se.launch import say

__all__ = [
    "LATEST",
    "WEIGHTS",
    "chain",
    "check_latest",
    "check_whole",
    "explain_failed_write",
    "remove_unfinished_checkpoint",
    "restore_latest",
]

LATEST = "latest-rank0.pt"
WEIGHTS = "weights.pt"  # the state dict in a folder that `composer-se slim` wrote
_NAME = re.compile(r"ep\d+-ba(\d+)-rank0\.pt")


def restore_latest(folder: Path) -> None:
    """Links to the newest whole checkpoint if the link to the latest is missing. Call it on rank zero only."""
    latest = folder / LATEST
    if os.path.lexists(latest):
        return
    newest = _newest_whole(folder)
    if newest:
        latest.symlink_to(newest.name)
        say(f"{latest}: was missing; it points to {newest.name} again, the newest checkpoint that is whole")


def check_latest(folder: Path) -> None:
    """Refuses to resume from a damaged checkpoint. Call it on rank zero only.

    Reads the file once in full and compares the checksums that `torch.save` stored. `torch.load` does not compare
    them, and a run that resumes from damaged weights looks like any other.

    Raises:
        UserError: If the latest checkpoint is damaged, or its link points to a missing file. The message names the
            newest whole checkpoint, if any, and the command to continue from it or to begin anew.
    """
    latest = folder / LATEST
    if not os.path.lexists(latest) or latest.is_dir():  # a sharded checkpoint is a folder; it is not checked
        return
    fault = _find_fault(latest)
    if fault is None:
        return
    damaged = folder / latest.readlink() if latest.is_symlink() else latest
    whole = _newest_whole(folder, but=damaged.name)
    if whole is None:
        raise UserError(
            f"{damaged}: the latest checkpoint is damaged ({fault}), and {folder} holds no other that is whole; "
            f"begin the training anew with `{shlex.join(['rm', str(latest)])}` and the same command"
        )
    mend = shlex.join(["ln", "-sf", whole.name, str(latest)])
    raise UserError(
        f"{damaged}: the latest checkpoint is damaged ({fault}); the one before it, {whole}, is whole: "
        f"continue from there with `{mend}` and the same command"
    )


def check_whole(checkpoint: Path) -> None:
    """Refuses a checkpoint that is damaged, or a link to a missing file.

    Raises:
        UserError: If the checkpoint is damaged or missing.
    """
    if checkpoint.name == LATEST:
        check_latest(checkpoint.parent)
    elif not checkpoint.is_dir() and (fault := _find_fault(checkpoint)):
        raise UserError(f"{checkpoint}: is damaged ({fault}); take another checkpoint")


def _newest_whole(folder: Path, but: str = "") -> Path | None:
    found = [(int(match[1]), path) for path in folder.glob("*.pt") if (match := _NAME.fullmatch(path.name))]
    newest_first = (path for _, path in sorted(found, reverse=True) if path.name != but and path.is_file())
    return next((path for path in newest_first if _find_fault(path) is None), None)


def _find_fault(checkpoint: Path) -> str | None:
    """Reads every record of a file that `torch.save` wrote. Returns its fault, or None when it is whole."""
    try:
        with zipfile.ZipFile(checkpoint) as records:
            garbled = records.testzip()
    except Exception as error:  # zipfile raises many kinds of errors for damaged files
        return getattr(error, "strerror", None) or one_line(error) or type(error).__name__
    return f"wrong checksum of its record {garbled}" if garbled else None


def explain_failed_write(error: BaseException, run_folder: Path) -> UserError | None:
    """Returns a `UserError` for an error in training that a failed write caused.

    Deletes an unfinished checkpoint. Composer makes `latest-rank0.pt` point to a checkpoint only when it is complete,
    so the run resumes from the checkpoint before.

    Returns:
        An error that names the file, the reason and the free space; None unless the disk is full or a checkpoint could
        not be written.
    """
    cause = next((link for link in chain(error) if isinstance(link, OSError) and link.errno), None)
    if cause is None:
        return None
    checkpoint = remove_unfinished_checkpoint(error)
    if checkpoint:
        latest = checkpoint.parent / LATEST
        origin = f"{latest.resolve().name}, which is intact" if latest.exists() else "the start"
        return failed_write(checkpoint, cause, checkpoint.parent, origin)
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        path = Path(os.fsdecode(cause.filename)) if cause.filename else run_folder
        return failed_write(path, cause, run_folder, "the last checkpoint")
    return None


def remove_unfinished_checkpoint(error: BaseException) -> Path | None:
    """Deletes the checkpoint that was being written when an error or a signal came.

    `torch.save` closes the file even then, so that it looks whole although parts of it are missing. Only the frames of
    the error hold the file's name.

    Returns:
        The path of the checkpoint; None if none was being written.
    """
    for link in chain(error):
        for frame, _ in traceback.walk_tb(link.__traceback__):
            if frame.f_code.co_name == "_write_checkpoint_file":
                checkpoint = Path(frame.f_locals["filename"])
                checkpoint.unlink(missing_ok=True)
                return checkpoint
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and the errors before it. After a failed write, `torch.save` raises an error of its own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
