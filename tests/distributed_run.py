"""A short training run for the launcher: saves every rank's weights before and after it. Arguments: FOLDER KIND..."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from composer import Trainer
from composer.models import ComposerClassifier
from composer.utils import FSDP2Config, dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from composer_se import SqueezeExcite

GLOBAL_BATCH = 8


def network(kind: str) -> nn.Sequential:
    """Without batch norm, whose statistics would be those of a rank's share of the batch.

    DDP sends out rank zero's weights. FSDP2 takes each rank's own piece: there all ranks have to start alike.
    """
    torch.manual_seed(100 + (dist.get_global_rank() if kind == "ddp" else 0))
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
    """All weights, put together from their shards."""
    parameters = trainer.state.model.state_dict().items()
    return {
        name.replace("module.module.", "module."): value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in parameters
        if isinstance(value, torch.Tensor)
    }


def run(kind: str) -> dict[str, dict[str, torch.Tensor]]:
    """Trains four steps and returns the weights at the start and at the end."""
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(
        torch.randn(4 * GLOBAL_BATCH, 3, 8, 8, generator=generator),
        torch.randint(4, (4 * GLOBAL_BATCH,), generator=generator),
    )
    model = ComposerClassifier(network(kind), num_classes=4)
    if kind == "fsdp2":
        for layer in model.module.children():
            layer._fsdp_wrap = isinstance(layer, nn.Conv2d | nn.Linear)  # pyright: ignore[reportArgumentType]
    # On gloo, FSDP2 adds up the gradients of the ranks, which DDP averages; with SE or without.
    lr = 0.1 / dist.get_world_size() if kind == "fsdp2" else 0.1
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        train_dataloader=DataLoader(
            data, batch_size=GLOBAL_BATCH // dist.get_world_size(), sampler=dist.get_sampler(data, drop_last=True)
        ),
        max_duration="1ep",
        algorithms=[SqueezeExcite(latent_channels=4, min_channels=16)],
        parallelism_config={"fsdp": FSDP2Config()} if kind == "fsdp2" else None,
        seed=5,
        device="cpu",
        progress_bar=False,
    )
    start = weights(trainer)
    trainer.fit()
    return {"start": start, "end": weights(trainer)}


if __name__ == "__main__":
    folder, *kinds = sys.argv[1:]
    for kind in kinds:
        torch.save(run(kind), Path(folder) / f"{kind}-rank{dist.get_global_rank()}.pt")
