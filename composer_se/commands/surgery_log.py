"""Raises the log level while a progress bar is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["surgery_logged_from"]


@contextmanager
def surgery_logged_from(level: int) -> Iterator[None]:
    """Makes the package log from this level on."""
    log = logging.getLogger("composer_se")
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)
