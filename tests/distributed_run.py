"""A short training run for the launcher: saves every rank's weights before and after it. Arguments: FOLDER [KIND]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.models import ComposerClassifier
from composer.utils import FSDP2Config, dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_se import SqueezeExcite

GLOBAL_BATCH = 8


def network(differ: bool) -> nn.Sequential:
    """Without batch norm, whose statistics would be those of a rank's share of the batch."""
    torch.manual_seed(100 + dist.get_global_rank() * differ)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    full = {
        name.replace("module.module.", "module."): value.full_tensor()
        if hasattr(value, "full_tensor")
        else value.clone()
        for name, value in trainer.state.model.state_dict().items()
    }
    return {name: value for name, value in full.items() if isinstance(value, torch.Tensor)}


def run(folder: Path, kind: str = "ddp") -> None:
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(
        torch.randn(4 * GLOBAL_BATCH, 3, 8, 8, generator=generator),
        torch.randint(4, (4 * GLOBAL_BATCH,), generator=generator),
    )
    model = ComposerClassifier(network(kind == "ddp"), num_classes=4)
    options: dict[str, Any] = {"parallelism_config": {"fsdp": FSDP2Config()}} if kind == "fsdp2" else {}
    if kind == "fsdp1":
        options = {"parallelism_config": {"fsdp": {"sharding_strategy": "FULL_SHARD"}}}
    if kind != "ddp":
        for module in model.module:
            module._fsdp_wrap = isinstance(module, nn.Conv2d | nn.Linear)
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        train_dataloader=DataLoader(
            data, batch_size=GLOBAL_BATCH // dist.get_world_size(), sampler=dist.get_sampler(data, drop_last=True)
        ),
        max_duration="1ep",
        algorithms=[SqueezeExcite(latent_channels=4, min_channels=16)],
        seed=5,
        device="cpu",
        progress_bar=False,
        **options,
    )
    start = weights(trainer)
    trainer.fit()
    torch.save({"start": start, "end": weights(trainer)}, folder / f"rank{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
