"""Measures the overhead of `GateMonitor` in training at its default interval.

    make gate-monitor-overhead

Trains a ResNet with Squeeze-and-Excitation for two intervals. Counts the operators of an observed batch and of another
one, and the numbers that they read and write. The difference, spread over the interval, is the overhead. Observed
batches and others are timed in one run, on one instance of the network. Few batches are observed, so trust only the
counts on a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from composer import Callback, Trainer
from composer.core import State
from composer.loggers import Logger
from composer.models import ComposerClassifier
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import get_model

from composer_se import GateMonitor, SqueezeExcite
from composer_se.gates.observe import se_blocks


class OperatorCounter(TorchDispatchMode):
    """Counts operators, and the numbers in the tensors that they take and return."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        self.numbers += sum(x.numel() for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
        return result


class Watch(Callback):
    """Records counters and clock: one before the monitor, at the start of every batch, another after it, at the end."""

    def __init__(self, counter: OperatorCounter | None, ends: list[Any], starts: bool) -> None:
        self.counter, self.ends, self.starts = counter, ends, starts

    def batch_start(self, state: State, logger: Logger) -> None:
        """Records before the monitor."""
        if self.starts:
            self.ends.append([self._now()])

    def batch_end(self, state: State, logger: Logger) -> None:
        """Records after the monitor."""
        if not self.starts:
            self.ends[-1].append(self._now())

    def _now(self) -> tuple[float, int, int]:
        counter = self.counter
        return time.perf_counter(), counter.operators if counter else 0, counter.numbers if counter else 0


def batches(args: argparse.Namespace, counter: OperatorCounter | None) -> tuple[list[tuple[float, int, int]], int]:
    """Seconds, operators and numbers of every batch of a run, and the number of SE layers."""
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    data = TensorDataset(images, torch.arange(args.batch_size) % 10)
    network = get_model(args.model, num_classes=10)
    ends: list[Any] = []
    trainer = Trainer(
        model=ComposerClassifier(network, num_classes=10),
        train_dataloader=DataLoader(data, args.batch_size),
        optimizers=torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9),
        max_duration=f"{2 * args.interval + 1}ba",
        algorithms=[SqueezeExcite(64, args.min_channels)],
        callbacks=[Watch(counter, ends, starts=True), GateMonitor(args.interval), Watch(counter, ends, starts=False)],
        progress_bar=False,
        device="cpu",
    )
    if counter is None:
        trainer.fit()
    else:
        with counter:
            trainer.fit()
    return [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in ends], len(se_blocks(trainer.state.model))


def main() -> None:
    """Prints the overhead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="of torchvision (default: resnet18)")
    parser.add_argument("--min-channels", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--interval", type=int, default=50, help="batches (default: the monitor's, 50)")
    args = parser.parse_args()
    counted, num_layers = batches(args, OperatorCounter())
    timed, _ = batches(args, None)
    print(f"{args.model}, {num_layers} SE layers, batch {args.batch_size}, {args.image_size}² pixels")
    # The first batch is left out: it warms up.
    for what, runs, column in (("operators", counted, 1), ("numbers read and written", counted, 2), ("ms", timed, 0)):
        scale = 1e3 if what == "ms" else 1
        observed = statistics.median(run[column] for run in runs[args.interval :: args.interval]) * scale
        plain = statistics.median(run[column] for i, run in enumerate(runs) if i % args.interval) * scale
        overhead = (observed - plain) / (args.interval * plain)
        print(f"{what}: {plain:,.0f} a batch, {observed:,.0f} when observed: {overhead:+.3%} at {args.interval}ba")


if __name__ == "__main__":
    main()
