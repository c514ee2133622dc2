"""A script for the `composer` launcher: trains on fixed images and writes what the gate monitor logged.

Without batch normalisation, whose statistics are those of one process's share, the gates of an image don't depend on
how the global batch is divided.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_se import GateMonitor, SqueezeExcite

GLOBAL_BATCH_SIZE = 12


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.GroupNorm(2, 16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def small_cost_network() -> nn.Sequential:
    """The same for three input channels, as `composer-se cost` feeds a network."""
    return nn.Sequential(nn.Conv2d(3, 1, 1), *small_network())


def images(num_samples: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 3, num_samples).view(-1, 1, 1, 1)
    data = scale * torch.randn(num_samples, 1, 8, 8, generator=generator)
    return TensorDataset(data, torch.arange(num_samples) % 10)


def train() -> dict[str, list[float]]:
    """Trains for eight batches in all processes together, and returns what was logged of batches 0, 3 and 6."""
    torch.manual_seed(0)
    network = small_network()
    data = images()
    loader = DataLoader(
        data, GLOBAL_BATCH_SIZE // dist.get_world_size(), sampler=dist.get_sampler(data, shuffle=True, drop_last=True)
    )
    logged = InMemoryLogger()
    trainer = Trainer(
        model=ComposerClassifier(network, num_classes=10),
        train_dataloader=loader,
        optimizers=torch.optim.SGD(network.parameters(), lr=0.1),
        max_duration="2ep",
        seed=1,
        algorithms=[SqueezeExcite(4, 8)],
        callbacks=[GateMonitor("3ba")],
        loggers=[logged],
        progress_bar=False,
    )
    trainer.fit()
    return {key: [float(value) for _, value in log] for key, log in logged.data.items() if key.startswith("gates/")}


if __name__ == "__main__":
    gates = train()
    if dist.get_global_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(gates))
