"""A callback that logs statistics of the gates of Squeeze-and-Excitation while a model trains."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import sys

import torch
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from composer_se.gates.observe import GateStatistics, describe, gate_sums, no_sums, observing, se_blocks
from composer_se.modules import SqueezeExcite2d

__all__ = ["GateMonitor"]

log = logging.getLogger(__name__)

CONSTANT_BELOW = 1e-3
SATURATED_ABOVE = 0.95
OBSERVATIONS_BEFORE_WARNING = 3


class GateMonitor(Callback):
    """Logs statistics of the gates of every Squeeze-and-Excitation layer.

    It observes one training batch per interval, over all processes and microbatches, and logs for each layer, by the
    name of its conv (`composer_se.gates.observe.GateStatistics` says more):

    * ``gates/mean/LAYER``
    * ``gates/std_over_samples/LAYER``: the spread of a channel's gate over images;
    * ``gates/std_over_channels/LAYER``: the spread over channels;
    * ``gates/share_near_0/LAYER`` and ``gates/share_near_1/LAYER``: gates below 0.05 and above 0.95 times
      their limit, which is 2 for blocks that start at identity, else 1.

    Warns once of a layer whose gates are constant over samples (a fixed scale, which a following normalisation layer
    undoes) or saturated (nearly all near 0 or 1) in three observed batches in a row.

    It computes on the device. Between observed batches it hooks nothing and does not wait for the device; an observed
    batch costs one reduction over processes and one transfer. A compiled model runs uncompiled while it is observed.
    Evaluation is never observed.

    Args:
        interval: From one observed batch to the next, in batches (``"50ba"``, or 50) or epochs (``"1ep"``: the first
            batch of each). The first batch is always observed. Default: ``"50ba"``.

    Raises:
        ValueError: If the interval is not a positive number of batches or epochs.

    Example:
        >>> trainer = Trainer(model=model, algorithms=[SqueezeExcite()], callbacks=[GateMonitor()])
    """

    def __init__(self, interval: int | str | Time = "50ba") -> None:
        self.interval = Time.from_input(interval, TimeUnit.BATCH)
        if self.interval.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH) or self.interval.value < 1:
            raise ValueError(
                f'interval is {interval!r}; give a number of batches or epochs, at least 1, such as "50ba" or "1ep".'
            )
        self._blocks: dict[str, SqueezeExcite2d] = {}
        self._sums: dict[str, Tensor] = {}
        self._observed_forward = contextlib.ExitStack()
        self._observing = False
        self._suspicions: dict[tuple[str, str], int] = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        """Decides if the batch is observed."""
        time = state.timestamp
        if self.interval.unit == TimeUnit.BATCH:
            self._observing = time.batch.value % self.interval.value == 0
        else:
            self._observing = time.batch_in_epoch.value == 0 and time.epoch.value % self.interval.value == 0

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Clears the sums, because automatic microbatching runs a batch again when memory did not suffice."""
        if self._observing:
            self._blocks = se_blocks(state.model)
            device = next(state.model.parameters()).device
            self._sums = {name: no_sums(block, device) for name, block in self._blocks.items()}

    def before_forward(self, state: State, logger: Logger) -> None:
        """Hooks the blocks for one forward pass."""
        if not self._observing:
            return
        self._observed_forward.close()  # left open by a forward pass that ran out of memory
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            # Compiled code would miss hooks that came later, or keep them when they are gone.
            self._observed_forward.enter_context(torch.compiler.set_stance("force_eager"))
        self._observed_forward.enter_context(observing(self._blocks, self._add))

    def after_forward(self, state: State, logger: Logger) -> None:
        """Removes the hooks, so that recomputation in the backward pass and evaluation are not observed."""
        self._observed_forward.close()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Logs the statistics of an observed batch, and warns."""
        if not self._observing:
            return
        self._observing = False
        if not self._blocks:
            return
        layers = self._statistics()
        logger.log_metrics(
            {
                f"gates/{key}/{name}": value
                for name, gates in layers.items()
                for key, value in dataclasses.asdict(gates).items()
            }
        )
        for name, gates in layers.items():
            self._warn(name, gates)

    def _add(self, name: str, logits: Tensor) -> None:
        self._sums[name] += gate_sums(logits, self._blocks[name].gate_limit)

    def _statistics(self) -> dict[str, GateStatistics]:
        """The statistics of each layer that ran, over all processes."""
        sizes = [len(sums) for sums in self._sums.values()]
        flat = torch.cat(list(self._sums.values()))  # every process has the same layout, also where a layer did not run
        dist.all_reduce(flat)
        values = torch.stack([describe(sums) for sums in flat.split(sizes)]).tolist()
        return {
            name: GateStatistics(*numbers)
            for name, numbers in zip(self._blocks, values, strict=True)
            if not math.isnan(numbers[0])
        }

    def _warn(self, name: str, gates: GateStatistics) -> None:
        """Warns of a layer that was constant or saturated in three observed batches in a row, once for each."""
        constant = (
            f"The gates of {name} are constant: a channel's gate varies over samples by {gates.std_over_samples:.1e} "
            f"around {gates.mean:.2f}. Squeeze-and-Excitation does nothing there; exclude the layer, or look why the "
            "block does not learn."
        )
        saturated = (
            f"The gates of {name} are saturated: {gates.share_near_0:.0%} are near 0 and {gates.share_near_1:.0%} near "
            "1, where their gradient vanishes. A lower learning rate or weight decay on the block may help."
        )
        for what, seen, message in (
            ("constant", gates.std_over_samples < CONSTANT_BELOW, constant),
            ("saturated", gates.share_near_0 + gates.share_near_1 > SATURATED_ABOVE, saturated),
        ):
            count = self._suspicions.get((name, what), 0)
            if count < OBSERVATIONS_BEFORE_WARNING:
                self._suspicions[name, what] = count = count + 1 if seen else 0
                if count == OBSERVATIONS_BEFORE_WARNING and dist.get_global_rank() == 0:
                    log.warning(message)
