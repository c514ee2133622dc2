"""Recipes with `trainable`: runs with a frozen backbone, killed and resumed, and wrong patterns."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from helpers import conv_norm_net
from recipe_runs import TINY, assert_same_weights, environment, final_state, train_until
from torch import nn

import composer_se
from composer_se.parts.models import build_network
from composer_se.recipe.load import load_recipe
from composer_se.recipe.run import train as train_here
from composer_se.recipe.trainer import Parts, build_parts, end_trainer, make_trainer
from composer_se.recipe.validate import make_plan
from composer_se.train import main

RUN = ("digits", *TINY, "eval_dataset=null", "save_interval=2ba", "max_duration=3ep", "trainable=[se, head]")
BLOCKS_AND_HEAD = 49_152 + 650


class _Interrupted(Exception):
    pass


class _InterruptsInTheSecondEpoch(Callback):
    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == 7:
            raise _Interrupted


def train_whole_and_interrupted(folder: Path) -> None:
    """Trains a run to its end, and one of the same recipe that is interrupted and resumed."""
    whole, resumed = (
        load_recipe("digits", [*RUN[1:], f"run_folder={folder}/{name}/runs/digits"]) for name in ("whole", "resumed")
    )
    train_here(whole)
    with contextlib.suppress(_Interrupted):
        train_here(resumed, [_InterruptsInTheSecondEpoch()])
    assert not (Path(resumed.run_folder) / "summary.json").exists()
    train_here(resumed)


def assert_only_blocks_and_head_were_trained(folder: Path) -> None:
    state = final_state(folder)
    weights = {name.replace("module.", ""): weight for name, weight in state["model"].items()}
    trained = {name for name in weights if ".se." in name or name.startswith("fc.")}
    assert {name.replace("module.", "") for name in state["optimizers"]["SGD"]["state"]} == trained
    torch.manual_seed(load_recipe("digits").seed)
    initial = build_network("cifar_resnet20", in_channels=1).state_dict()
    for name, initial_weight in initial.items():  # running statistics too
        conv = name.replace(".weight", ".conv.weight")
        assert torch.equal(weights.get(name, weights.get(conv)), initial_weight) == (name not in trained), name
    assert json.loads((folder / "runs/digits/summary.json").read_text())["trained"] == BLOCKS_AND_HEAD


@pytest.mark.launch
@pytest.mark.usefixtures("as_shipped")
def test_killed_run_with_a_frozen_backbone_ends_with_the_weights_of_one_never_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)  # as the process that is killed
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "killed":
            train_until(tmp_path / name, 8, signal.SIGKILL, *RUN)  # in the second epoch
            assert not Path("runs/digits/summary.json").exists()
        assert main(RUN) == 0
        assert f"{BLOCKS_AND_HEAD:,} (15.63%)" in capfd.readouterr().out
    assert_same_weights(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    assert_only_blocks_and_head_were_trained(tmp_path / "killed")


@pytest.mark.launch
def test_two_processes_resume_a_run_with_a_frozen_backbone(tmp_path: Path) -> None:
    launcher = str(Path(sys.executable).parent / "composer")
    command = [launcher, "-n", "2", __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(final_state(tmp_path / "whole"), final_state(tmp_path / "resumed"))
    assert_only_blocks_and_head_were_trained(tmp_path / "resumed")


def test_loaded_weights_stay_under_algorithms_that_change_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = build_network("cifar_resnet20", in_channels=1)
    torch.save(network.state_dict(), "weights.pt")
    changes = ("algorithms.blurpool={}", "algorithms.ghost_batchnorm={ghost_batch_size: 8}")
    some = (
        "trainable=[head]",
        "max_duration=2ba",
        "scheduler=null",
        "load_path=weights.pt",
        "load_strict_model_weights=false",
    )
    train_here(load_recipe("digits", [*TINY, *changes, *some]))
    state = final_state(tmp_path)
    assert len(state["optimizers"]["SGD"]["state"]) == 2
    loaded = network.state_dict()
    for name, value in state["model"].items():
        plain = name.removeprefix("module.")
        if plain in loaded:
            assert torch.equal(value, loaded[plain]) != plain.startswith("fc."), name
        elif name.endswith(("running_mean", "num_batches_tracked")):  # under another name inside of GhostBatchNorm
            assert not value.any(), name


def test_freezes_after_all_other_algorithms() -> None:
    network = conv_norm_net()
    recipe = load_recipe("digits", [*TINY, "trainable=[head]", "train_batch_size=16"])
    freeze = build_parts(recipe, make_plan(recipe)).algorithms.pop()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    late = composer_se.SqueezeExcite(min_channels="auto")
    trainer = make_trainer(Parts(network, 4, [freeze, late], optimizer), device="cpu", progress_bar=False)
    assert sum(isinstance(module, composer_se.SqueezeExcite2d) for module in network.modules()) == 1
    assert trainer.state.optimizers[0].param_groups[0]["params"] == list(network[-1].parameters())
    assert not any(parameter.requires_grad for parameter in network[:-1].parameters())
    trainer.state.model.train()
    assert not any(module.training for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    end_trainer(trainer)


@pytest.mark.parametrize(
    ("trainable", "complaint"),
    [
        ("[se, haed]", "'haed' matches no parameter of the model. Nearest names: head, "),
        ("[]", "Nothing would train"),
        ("head", "expected a list, in brackets"),
    ],
)
def test_wrong_patterns_are_one_line_and_nothing_is_written(
    trainable: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*RUN[:-1], f"trainable={trainable}"]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"composer_se.train: error: trainable: {complaint}")
    assert not list(tmp_path.iterdir())


def test_a_run_resumes_with_the_same_patterns_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, "max_duration=2ba"]) == 0
    assert main([*RUN[:-1], "max_duration=3ba"]) == 2
    assert "trainable (was ['se', 'head'], now null)" in capfd.readouterr().err


if __name__ == "__main__":
    train_whole_and_interrupted(Path(sys.argv[1]))
