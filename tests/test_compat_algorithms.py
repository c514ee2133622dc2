"""SE beside each of Composer's algorithms, first and last in the list: trained, saved and resumed to the same end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import composer.algorithms as ca
import pytest
import torch
from composer import Algorithm, Trainer
from composer.models import ComposerClassifier
from composer.optim import DecoupledSGDW
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models.resnet import Bottleneck
from torchvision.transforms import ToTensor

from composer_se import SqueezeExcite

WIDTH = 32

ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "BlurPool": lambda: ca.BlurPool(min_channels=8),
    "ChannelsLast": ca.ChannelsLast,
    "Factorize": lambda: ca.Factorize(min_channels=WIDTH, latent_channels=4, min_features=WIDTH, latent_features=4),
    "GhostBatchNorm": lambda: ca.GhostBatchNorm(ghost_batch_size=2),
    "WeightStandardization": ca.WeightStandardization,
    "StochasticDepth": lambda: ca.StochasticDepth("ResNetBottleneck", drop_rate=0.5),
    "StochasticDepth, by sample": lambda: ca.StochasticDepth("ResNetBottleneck", "sample", drop_rate=0.5),
    "LayerFreezing": lambda: ca.LayerFreezing(freeze_start=0.5, freeze_level=0.5),
    "EMA": lambda: ca.EMA(half_life="1ba"),
    "SWA": lambda: ca.SWA(swa_start="1ep", swa_end="2ep", update_interval="1ba"),
    "SAM": lambda: ca.SAM(interval=1),
    "MixUp": ca.MixUp,
    "CutMix": ca.CutMix,
    "CutOut": ca.CutOut,
    "ColOut": ca.ColOut,
    "AugMix": ca.AugMix,
    "RandAugment": ca.RandAugment,
    "LabelSmoothing": ca.LabelSmoothing,
    "ProgressiveResizing": lambda: ca.ProgressiveResizing(delay_fraction=0.0, finetune_fraction=0.0),
    "SelectiveBackprop": lambda: ca.SelectiveBackprop(start=0.0, end=1.0, interrupt=0),
    "GradientClipping": lambda: ca.GradientClipping("norm", 0.1),
    "LowPrecisionGroupNorm": ca.LowPrecisionGroupNorm,
    "NoOpModel": ca.NoOpModel,
}


class Net(nn.Module):
    """A stem, two bottleneck blocks and a classifier: something for every algorithm to change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, stride=2, padding=1), nn.GroupNorm(4, WIDTH), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.blocks = nn.Sequential(Bottleneck(WIDTH, WIDTH // 4), Bottleneck(WIDTH, WIDTH // 4))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)))


def train(algorithms: list[Algorithm], folder: Path, load_path: Path | None = None, **options: Any) -> Trainer:
    """A Trainer for two epochs of two batches that saves after each epoch."""
    torch.manual_seed(1)
    model = ComposerClassifier(Net(), num_classes=2)
    # Composer restores SAM's optimizer without the state of the one inside.
    momentum = 0.0 if any(isinstance(algorithm, ca.SAM) for algorithm in algorithms) else 0.9
    images = FakeData(8, (3, 16, 16), num_classes=2, transform=ToTensor())
    return Trainer(
        model=model,
        optimizers=DecoupledSGDW(model.parameters(), lr=0.1, momentum=momentum),
        train_dataloader=DataLoader(images, batch_size=4, drop_last=True),
        max_duration="2ep",
        algorithms=algorithms,
        seed=5,
        device="cpu",
        save_folder=str(folder),
        save_filename="ep{epoch}.pt",
        load_path=None if load_path is None else str(load_path),
        progress_bar=False,
        **options,
    )


def in_order(name: str, order: str) -> list[Algorithm]:
    """The algorithm alone, or with SE before or after it."""
    squeeze_excite, other = SqueezeExcite(latent_channels=8, min_channels=WIDTH), ALGORITHMS[name]()
    return {"alone": [other], "SE first": [squeeze_excite, other], "SE last": [other, squeeze_excite]}[order]


def se_weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in trainer.state.model.state_dict().items() if ".se." in name}


RESUMABLE = [name for name in ALGORITHMS if name not in ("StochasticDepth", "LayerFreezing")]


@pytest.mark.parametrize("order", ["SE first", "SE last"])
@pytest.mark.parametrize("name", RESUMABLE)
def test_composer_algorithms(
    name: str, order: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Composer's algorithms, SE first and last in the list: trained, saved, resumed to the same weights."""
    record_property("row", name)
    whole = train(in_order(name, order), tmp_path / "whole")
    before = se_weights(whole)
    whole.fit()
    resumed = train(in_order(name, order), tmp_path / "resumed", tmp_path / "whole/ep1.pt")
    resumed.fit()

    if name == "NoOpModel":
        record_property("note", "NoOpModel puts a single number in the model's place: no SE is left, on purpose")
        assert se_weights(whole) == {}
    else:
        assert len(before) == 2 * 3
        assert [weight for weight, value in se_weights(whole).items() if torch.equal(value, before[weight])] == []
    if name == "SAM":
        record_property("note", "resumed under SAM, Composer's optimizer starts without momentum, with or without SE")
    expected, actual = whole.state.model.state_dict(), resumed.state.model.state_dict()
    assert expected.keys() == actual.keys()
    assert [weight for weight in expected if not torch.equal(expected[weight], actual[weight])] == []


@pytest.mark.parametrize("order", ["alone", "SE first", "SE last"])
def test_stochastic_depth_of_blocks(
    order: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None]
) -> None:
    """Composer's StochasticDepth by block: trained, saved, resumed from the weights."""
    record_property(
        "note",
        "Composer can't restore its optimizer, with or without SE, and says so: resume with `load_weights_only=True`",
    )
    train(in_order("StochasticDepth", order), tmp_path / "whole").fit()
    checkpoint = tmp_path / "whole/ep1.pt"
    with pytest.raises(KeyError, match=r"conv1\.weight"):
        train(in_order("StochasticDepth", order), tmp_path / "resumed", checkpoint)
    assert "will cause an error when resuming without `load_weights_only=True`" in caplog.text
    resumed = train(in_order("StochasticDepth", order), tmp_path / "resumed", checkpoint, load_weights_only=True)
    before = se_weights(resumed)
    stored = torch.load(checkpoint, weights_only=False)["state"]["model"]
    assert all(torch.equal(stored[name], weight) for name, weight in before.items())
    resumed.fit()
    assert [weight for weight, value in se_weights(resumed).items() if torch.equal(value, before[weight])] == []


@pytest.mark.parametrize("order", ["alone", "SE first", "SE last"])
def test_layer_freezing(order: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Composer's LayerFreezing: trained, saved and resumed before the first layer is frozen."""
    record_property("note", "once a layer is frozen, Composer can't save a checkpoint, with or without SE")

    def train_to_the_end(folder: str, load_path: Path | None = None) -> Trainer:
        trainer = train(in_order("LayerFreezing", order), tmp_path / folder, load_path)
        with pytest.raises(KeyError):  # the checkpoint after the second epoch, at whose end layers are frozen
            trainer.fit()
        return trainer

    whole = train_to_the_end("whole")
    resumed = train_to_the_end("resumed", tmp_path / "whole/ep1.pt")
    frozen = {name for name, parameter in whole.state.model.named_parameters() if not parameter.requires_grad}
    assert (
        "module.stem.0.weight" in frozen
        or {"module.stem.0.conv.weight", "module.stem.0.se.pool_and_mlp.2.weight"} <= frozen
    )
    expected, actual = whole.state.model.state_dict(), resumed.state.model.state_dict()
    assert [weight for weight in expected if not torch.equal(expected[weight], actual[weight])] == []
