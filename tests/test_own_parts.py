"""Parts of the user's own by name, in every section of a recipe, from the current folder."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from composer_se.cli import main
from composer_se.compare import kept_speeds, speed
from composer_se.recipe.load import load_recipe
from composer_se.recipe.trainer import build_parts
from composer_se.recipe.validate import make_plan

PARTS = """
from __future__ import annotations

import torch
from composer import Algorithm, Callback, Event
from composer.loggers import LoggerDestination
from torch import nn
from torch.utils.data import Dataset, IterableDataset


def network(num_classes: int, width: int = 8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, num_classes),
    )

class Images(Dataset):
    classes = ["dark", "light"]

    def __init__(self, train: bool, brightness: float = 1.0):
        self.size, self.brightness = 32 if train else 8, brightness

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.rand(1, 8, 8) + index % 2 * self.brightness, index % 2

def optimizer(parameters, rate: float):
    return torch.optim.SGD(parameters, lr=rate)

def scheduler(factor: float = 1.0):
    return lambda state, ssr: factor

class Count(Algorithm):
    def __init__(self, start: int = 0):
        self.count = start

    def match(self, event, state):
        return event == Event.BATCH_END

    def apply(self, event, state, logger):
        self.count += 1
        logger.log_metrics({"own/count": self.count})

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

class Say(Callback):
    def fit_end(self, state, logger):
        print("own callback")

class Sink(LoggerDestination):
    def log_metrics(self, metrics, step=None):
        print("own logger")

def images_without_split():
    return Images(True)

def no_images(train: bool):
    return 3

class Stream(IterableDataset):
    def __init__(self, train: bool):
        pass

    def __iter__(self):
        return iter(())

def array_images(train: bool):
    return [(1, 2)]

class Empty(Images):
    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError("empty")

class Pictures(Images):
    def __getitem__(self, index):
        return "picture", 0

class Shares(Images):
    def __getitem__(self, index):
        return torch.rand(1, 8, 8), 0.5

def takes_nothing():
    return lambda: 1.0

def rude():
    raise KeyError("manners")
"""

RECIPE = """
model: {name: my_package.parts:network}
train_dataset: {name: my_package.parts:Images, brightness: 2}
eval_dataset: {name: my_package.parts:Images}
optimizer: {name: my_package.parts:optimizer, rate: 0.1}
scheduler: {name: my_package.parts:scheduler, factor: 0.5}
algorithms:
  my_package.parts:Count: {start: 5}
  squeeze_excite: {min_channels: 1, latent_channels: 4}
callbacks:
  my_package.parts:Say: {}
  lr_monitor: {}
loggers:
  my_package.parts:Sink: {}
max_duration: 1ep
train_batch_size: 8
progress_bar: false
"""


@pytest.fixture(autouse=True)
def own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "parts.py").write_text(PARTS)
    (tmp_path / "own.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in ("my_package", "my_package.parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def lines() -> list[dict]:
    return [json.loads(line) for line in Path("runs/own/metrics.jsonl").read_text().splitlines()]


def test_a_run_of_own_parts_alone_trains_resumes_and_its_gates_are_shown(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["train", "own.yaml", "model.num_classes=2", "train_dataset.num_workers=0", "eval_dataset.num_workers=0"]
    assert main(command) == 0
    said = capfd.readouterr().out
    assert "own callback" in said
    assert "own logger" in said
    assert [line["own/count"] for line in lines() if "own/count" in line] == [6, 7, 8, 9]
    rates = [value for line in lines() for key, value in line.items() if key.startswith("lr-")]
    assert set(rates) == {0.05}
    assert main([*command, "max_duration=2ep"]) == 0  # from the checkpoint, the algorithm's state with it
    assert "epoch 1, batch 4" in capfd.readouterr().err
    assert [line["own/count"] for line in lines() if "own/count" in line] == [*range(6, 14)]
    assert main([*command, "max_duration=3ep", "algorithms={'my_package.parts:Count': {start: 6}}"]) == 2
    assert "algorithms.my_package.parts:Count.start (was 5, now 6)" in capfd.readouterr().err
    assert main(["gates", "runs/own"]) == 0
    assert "dark" in Path("runs/own/gates/gates.json").read_text()
    assert json.loads(Path("runs/own/classes.json").read_text()) == ["dark", "light"]
    assert "Classes: dark, light" in Path("runs/own/report.html").read_text()


def test_arms_of_a_comparison_can_be_own_parts(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_speeds, "ROUNDS", 1)
    monkeypatch.setattr(speed, "TURN_SECONDS", 0.0)
    arms = ["--arm", "plain", "model.width=8", "--arm", "wide", "model.width=16"]
    shared = ["model.num_classes=2", "callbacks={}", "loggers={}"]
    shared += ["train_dataset.num_workers=0", "eval_dataset.num_workers=0"]
    assert main(["compare", "own.yaml", *arms, "--seeds", "0", *shared]) == 0
    assert "wide" in capfd.readouterr().out


def test_arguments_of_own_parts_in_a_package_are_set_on_the_command_line() -> None:
    recipe = load_recipe("own.yaml", ["algorithms[my_package.parts:Count].start=7"])
    assert recipe.algorithms
    assert recipe.algorithms["my_package.parts:Count"] == {"start": 7}


OWN = "my_package.parts"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_dataset.name=my_package.part:Images", "train_dataset.name: .* module 'my_package.part' can't be imp"),
        (f"train_dataset.name={OWN}:Image", "has no function or class 'Image'; did you mean 'Images'"),
        ("train_dataset.brightnes=3", "train_dataset.brightnes: unknown argument .*; did you mean 'brightness'"),
        ("train_dataset.brightness=high", "train_dataset.brightness: expected a number, got 'high'"),
        ("train_dataset.train=true", "train_dataset.train: unknown argument"),
        (f"train_dataset={{name: {OWN}:images_without_split}}", "train_dataset.name: .* takes no argument train"),
        (f"train_dataset={{name: {OWN}:no_images}}", "returned a int, expected a map-style torch.utils.data.Dataset"),
        (f"train_dataset={{name: {OWN}:Stream}}", "returned a Stream, expected a map-style"),
        (f"train_dataset={{name: {OWN}:array_images}}", "returned a list, expected a map-style"),
        (f"train_dataset={{name: {OWN}:Empty}}", r"train_dataset.name: .*:Empty fails at its first image \(IndexError"),
        (f"train_dataset={{name: {OWN}:Pictures}}", r"yields \(str, int\), expected a tensor \(C, H, W\)"),
        (f"train_dataset={{name: {OWN}:Shares}}", r"yields \(of shape \(1, 8, 8\), float\), expected a tensor"),
        (f"eval_dataset={{name: {OWN}:Pictures}}", "eval_dataset.name: .* yields"),
        (f"optimizer={{name: {OWN}:network, num_classes: 3}}", "optimizer.num_classes"),
        (f"optimizer={{name: {OWN}:scheduler}}", "optimizer.name: .* returned a function, expected a torch.optim.Opt"),
        ("optimizer.parameters=3", "optimizer.parameters: unknown argument"),
        ("optimizer={name: my_package.parts:optimizer}", "optimizer.rate: required"),
        (f"scheduler={{name: {OWN}:takes_nothing}}", "scheduler.name: .* expected a scheduler, called with"),
        (f"scheduler={{name: {OWN}:rude}}", r"scheduler.name: .*:rude fails \(KeyError: 'manners'\)"),
        (f"algorithms={{{OWN}:Say: {{}}}}", f"algorithms.{OWN}:Say: .* returned a Say, expected a composer.Algorithm"),
        (f"algorithms={{{OWN}:Count: {{begin: 1}}}}", f"algorithms.{OWN}:Count.begin: unknown argument"),
        (f"algorithms={{{OWN}:Counter: {{}}}}", "has no function or class 'Counter'; did you mean 'Count'"),
        (f"callbacks={{{OWN}:Count: {{}}}}", "returned a Count, expected a composer.Callback"),
        (f"callbacks={{{OWN}:Say: {{loud: true}}}}", f"callbacks.{OWN}:Say.loud: unknown argument"),
        (f"loggers={{{OWN}:Say: {{}}}}", "returned a Say, expected a composer.loggers.LoggerDestination"),
        (f"model={{name: {OWN}:no_images, train: true}}", "model.name: .* returned a int, expected a torch.nn.Module"),
    ],
)
def test_a_wrong_name_or_kind_is_refused_in_one_line_and_nothing_is_written(
    override: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "own.yaml", "model.num_classes=2", override]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not Path("runs").exists()


def test_own_images_are_the_same_for_a_seed_epoch_and_index() -> None:
    recipe = load_recipe("own.yaml", ["model.num_classes=2", "train_dataset.num_workers=0"])
    plan = make_plan(recipe)
    first, second = (build_parts(recipe, plan).train_loader.dataset for _ in range(2))
    assert torch.equal(first[1, 5][0], second[1, 5][0])
    assert not torch.equal(first[1, 5][0], second[2, 5][0])
