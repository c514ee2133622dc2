"""Small networks and references that several tests use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from composer_se.cost.settings import Settings
from composer_se.options import SqueezeExciteOptions


def plain_gate(u: Tensor, z: Tensor, limit: float = 1.0) -> Tensor:
    """The product as the paper writes it, under plain autograd."""
    return u * limit * torch.sigmoid(z)[..., None, None]


def plain_squeeze_excite(u: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The block as the paper writes it, under plain autograd: no biases."""
    return plain_gate(u, torch.relu(u.mean((-2, -1)) @ w1.T) @ w2.T)


def conv_norm_net(channels: tuple[int, ...] = (8, 16, 32), in_channels: int = 3, num_classes: int = 4) -> nn.Sequential:
    """Conv, batch norm, ReLU(inplace) for every width, then a linear classifier."""
    layers: list[nn.Module] = []
    for width in channels:
        layers += [
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        in_channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that one forward pass keeps for backward, storages counted once and parameters not at all."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).sum()
    total = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return total


def final_accuracy(run_folder: Path) -> float:
    """The held-out accuracy in the summary of a complete run."""
    metrics = json.loads((run_folder / "summary.json").read_text())["metrics"]
    return next(value for name, value in metrics.items() if name.endswith("MulticlassAccuracy"))


def cost_settings(**changes: Any) -> Settings:
    """Settings of a small study of costs."""
    settings: dict[str, Any] = {
        "min_channels": (8,),
        "squeeze_excite": SqueezeExciteOptions(),
        "against_composer": False,
        "batch_size": 2,
        "image_size": 8,
        "device": torch.device("cpu"),
        "precision": "fp32",
        "channels_last": False,
        "compiled": False,
        "instances": 2,
        "rounds": 1,
        "layers": False,
    }
    return Settings(**settings | changes)
