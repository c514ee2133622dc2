"""What one process of a launch settles before anything heavy is imported: who speaks, and its share of the cores."""

from __future__ import annotations

import os
import signal
import sys
import time

__all__ = ["available_cores", "is_local_rank_zero", "leave_together", "say", "share_cores"]

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
        # Composer's handler would turn the launcher's SIGTERM into an exit code, which the launcher would report.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_PATIENCE_SECONDS)
    print(message, file=sys.stderr, flush=True)


def available_cores() -> int:
    """The number of cores that each process of this node can have for itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share_cores() -> None:
    """Divides the cores among the processes of this node, unless the user's environment already does.

    OpenMP reads these variables when torch is imported, so this comes first. Threads that wait without spinning are a
    safeguard, and have a price. On two cores of which another program had one, a step of the digits recipe's network
    took 49 ms instead of 114 ms; with nothing beside it, 42 ms instead of 15 ms, where layers are so small that most of
    the time goes into waking threads (ResNet-18, 8 images of 224 pixels: 7 % more). On a machine of your own, set
    OMP_WAIT_POLICY=ACTIVE.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
