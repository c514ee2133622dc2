"""One process of a launch, before torch is imported: its output, and its share of the cores.

Imports nothing but the standard library, so that a command can refuse wrong input at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator

__all__ = [
    "available_cores",
    "is_local_rank_zero",
    "keep_freed_memory",
    "leave_interrupted",
    "leave_together",
    "log_on_terminal",
    "logged_from",
    "say",
    "share_cores",
    "threads_for",
]

# How two cores are used. To wake a second thread costs more than it gives where maps are small: `digits` takes 1.18
# times as long with two passive threads as with one. Threads that wait actively are slow on a busy machine: with one
# core taken `digits` takes 1.9 times as long as with passive ones (`make threads`, two AMD EPYC cores).
PIXELS_PER_THREAD = 2**14  # a thread more for as many pixels of a step; digits has 2**12
WAIT_POLICY = "PASSIVE"  # of the threads, where there are several

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 2**31 - 1  # bytes, the largest int

_CHOSEN_HERE = "COMPOSER_SE_CHOOSES_THREADS"

# Long enough for the slowest process to get as far as the fastest.
_PATIENCE_SECONDS = 30.0


def is_local_rank_zero() -> bool:
    """True if the user of this node sees the output of this process."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def say(message: str) -> None:
    """Prints one line to stderr, once per node."""
    if is_local_rank_zero():
        print(message, file=sys.stderr, flush=True)


def leave_together(message: str) -> None:
    """Prints why this process ends, so that the user reads it once.

    All processes find the same fault. The launcher ends the others as soon as one has left, and shows their
    output only if they left by themselves; so the one whose output the user sees goes first. Another process that
    is still there after a while had a fault of its own, and says so.
    """
    if not is_local_rank_zero():
        # Composer's handler would turn the launcher's SIGTERM into an exit code, which the launcher would report.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_PATIENCE_SECONDS)
    print(message, file=sys.stderr, flush=True)


def leave_interrupted(message: str) -> None:
    """Prints how an interrupted command continues. A process whose output the user doesn't see ends here.

    It ends by a signal, because after an exit code the launcher would print all output of the process.
    """
    if not is_local_rank_zero():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    say(message)


@contextlib.contextmanager
def log_on_terminal() -> Iterator[None]:
    """Shows our own log on the process the user watches, and hides two warnings that the user can ignore."""
    log = logging.getLogger("composer_se")
    propagate = log.propagate
    handler = logging.StreamHandler()
    log.addHandler(handler)
    log.propagate = False
    # Composer says this of every evaluation set whose last batch is not full.
    warnings.filterwarnings("ignore", message="Cannot split tensor of length")
    # And this of label smoothing, whose targets add up to one but for rounding.
    warnings.filterwarnings("ignore", message="Some targets have less than 1 total probability")
    try:
        with logged_from(logging.INFO if is_local_rank_zero() else logging.WARNING):
            yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


@contextlib.contextmanager
def logged_from(level: int) -> Iterator[None]:
    """Shows our own log from this level on, which may be raised while a progress bar is shown."""
    log = logging.getLogger("composer_se")
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


def available_cores() -> int:
    """The number of cores that each process of this node can have for itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share_cores() -> None:
    """Divides the cores among the processes of this node, unless the user's environment already does.

    OpenMP reads these variables when torch is imported, so this comes first. `threads_for` takes fewer threads for
    small work.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(available_cores())
        os.environ[_CHOSEN_HERE] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)


def keep_freed_memory() -> None:
    """Lets glibc keep the memory that tensors free for the next step, unless the user's environment sets `MALLOC_…`.

    By default large blocks go back to the system, which clears every page when they are asked for again. A training
    step of a ResNet-50 at batch 16 takes 4.9 s with this setting and 5.0 to 6.8 s without, on two cores.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _LARGE)


def threads_for(pixels: int) -> int | None:
    """The number of threads for training steps on a number of pixels per process.

    Returns:
        None where the user's environment says how many.
    """
    if _CHOSEN_HERE not in os.environ:
        return None
    return min(available_cores(), max(1, pixels // PIXELS_PER_THREAD))
