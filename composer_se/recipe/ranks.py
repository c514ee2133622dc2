"""What one process of a launch needs to know before anything heavy is imported: its rank, and who speaks."""

from __future__ import annotations

import os
import sys
import time

__all__ = ["is_local_rank_zero", "leave_together", "say"]

# Long enough for the slowest process to get as far as the fastest.
_PATIENCE_SECONDS = 30.0


def is_local_rank_zero() -> bool:
    """Whether this process's output is what the user of this node sees."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def say(message: str) -> None:
    """Prints one line to stderr, once per node."""
    if is_local_rank_zero():
        print(message, file=sys.stderr, flush=True)


def leave_together(message: str) -> None:
    """Reports what made this process give up, so that the user reads it once.

    All processes find the same fault. The launcher ends the others as soon as one has left, and shows their
    output only if they left by themselves; so the one whose output the user sees goes first. Another process that
    is still there after a while had a fault of its own, and says so.
    """
    if not is_local_rank_zero():
        time.sleep(_PATIENCE_SECONDS)
    print(message, file=sys.stderr, flush=True)
