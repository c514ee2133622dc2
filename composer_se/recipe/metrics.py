"""Writes metrics as JSON lines: one line per step, even if the run is killed and resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from composer_se.files import replace_file, writing

__all__ = ["MetricsFile"]


# Left out: Composer logs the position at the start of a batch, our lines have the position at its end.
_POSITION = frozenset(
    f"time/{unit}"
    for unit in ("epoch", "batch", "sample", "token", "batch_in_epoch", "sample_in_epoch", "token_in_epoch")
)


class MetricsFile(LoggerDestination):
    """Writes one line per training step, per epoch and per evaluation, on rank zero.

    A line is an object with the completed `epoch`s, `batch`es and `sample`s, and every number that was logged since
    the line before. A number that is not finite is null. A run that resumes drops the lines after its checkpoint, since
    it trains these steps again.

    Args:
        path: The file. Training creates it when it starts.

    Attributes:
        latest: The last value of every number.
        hyperparameters: The hyperparameters that the Trainer and its algorithms logged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hyperparameters: dict[str, Any] = {}
        self.latest: dict[str, float | None] = {}
        self._pending: dict[str, float | None] = {}

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Keeps the hyperparameters for the summary. The file does not have them."""
        self.hyperparameters.update(hyperparameters)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Collects numbers for the next line."""
        for name, value in metrics.items():
            number = _as_number(value)
            if number is not None and name not in _POSITION:
                self._pending[name] = number if math.isfinite(number) else None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drops the lines that the run is about to write again."""
        if dist.get_global_rank() == 0:
            kept = _lines_until(self.path, int(state.timestamp.epoch), int(state.timestamp.batch))
            replace_file(self.path, "".join(kept))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Writes the line of a training step, of an epoch or of an evaluation."""
        pending, self._pending = self._pending, {}
        self.latest.update(pending)
        if dist.get_global_rank() != 0 or not pending:
            return
        time = state.timestamp
        position = {"epoch": int(time.epoch), "batch": int(time.batch), "sample": int(time.sample)}
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(position | pending) + "\n")

    epoch_end = eval_end = batch_end
    eval_standalone_start = fit_start  # drops a line cut short, or the next would be appended to it


def _as_number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _lines_until(path: Path, epoch: int, batch: int) -> list[str]:
    """The lines up to a position; a last line cut short by a kill is dropped."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        content = json.loads(line)
        if (content["epoch"], content["batch"]) <= (epoch, batch):
            kept.append(line)
    return kept
