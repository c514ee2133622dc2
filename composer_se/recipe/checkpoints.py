"""The checkpoints of a run on the disk: whether the latest is whole, and which one to fall back on.

Composer writes `ep{epoch}-ba{batch}-rank0.pt` under its final name, then removes the link `latest-rank0.pt` and makes
a new one. A run resumes from what the link points to. A kill or a full disk can leave a file cut short that nothing
points to; a kill at the wrong moment, whole files and no link; a crash of the machine, a link to a damaged file.
"""

from __future__ import annotations

import os
import re
import shlex
import zipfile
from pathlib import Path

from composer_se.errors import UserError
from composer_se.recipe import ranks
from composer_se.recipe.messages import one_line

__all__ = ["LATEST", "check_latest", "local_folder", "restore_latest"]

LATEST = "latest-rank0.pt"
_NAME = re.compile(r"ep\d+-ba(\d+)-rank0\.pt")


def local_folder(save_folder: str) -> Path | None:
    """The folder of the checkpoints; None where they are in an object store."""
    return None if "://" in save_folder else Path(save_folder)


def restore_latest(folder: Path) -> None:
    """Makes the link that a kill took away, so that a run with whole checkpoints doesn't begin anew. For rank zero."""
    latest = folder / LATEST
    if os.path.lexists(latest):
        return
    newest = _newest_whole(folder)
    if newest:
        latest.symlink_to(newest.name)
        ranks.say(f"{latest}: was missing; it points to {newest.name} again, the newest checkpoint that is whole")


def check_latest(folder: Path) -> None:
    """Refuses to resume from a damaged checkpoint. For rank zero.

    The file is read once in full, at the speed of the disk or of a CRC-32: `torch.save` stores checksums,
    `torch.load` does not compare them, and a run that goes on from garbled weights looks like one that doesn't.

    Raises:
        UserError: The latest checkpoint is damaged or gone. Names it, the newest whole one before it, and the command
            that makes the run continue from there.
    """
    latest = folder / LATEST
    if not os.path.lexists(latest) or latest.is_dir():  # a sharded checkpoint is a folder, with checks of its own
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


def _newest_whole(folder: Path, but: str = "") -> Path | None:
    found = [(int(match[1]), path) for path in folder.glob("*.pt") if (match := _NAME.fullmatch(path.name))]
    newest_first = (path for _, path in sorted(found, reverse=True) if path.name != but and path.is_file())
    return next((path for path in newest_first if _find_fault(path) is None), None)


def _find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a file that `torch.save` wrote; None when it is whole."""
    try:
        with zipfile.ZipFile(checkpoint) as records:
            garbled = records.testzip()
    except OSError as error:
        return error.strerror or one_line(error)
    except Exception as error:  # zipfile has another one for every byte that can be wrong
        return one_line(error) or type(error).__name__
    return f"wrong checksum of its record {garbled}" if garbled else None
