"""`GateMonitor` logs what the gates do, and leaves training as it is."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Trainer
from composer.core import State
from composer.loggers import InMemoryLogger, Logger
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader
from two_process_gates import images, small_network, train

from composer_se import GateMonitor, SqueezeExcite, SqueezeExciteConv2d, ops
from composer_se.gates.observe import NEAR, describe, gate_sums, se_blocks

STATISTICS = {"mean", "std_over_samples", "std_over_channels", "share_near_0", "share_near_1"}
LAYERS = {"0", "3"}


def fit(*callbacks: Callback, batch_size: int = 12, duration: str = "4ba", lr: float = 0.1, **kwargs: Any) -> Trainer:
    """Trains the small network for four batches per epoch; what was logged is in `trainer.logger.destinations[0]`."""
    torch.manual_seed(0)
    network = small_network()
    trainer = Trainer(
        model=ComposerClassifier(network, num_classes=10),
        train_dataloader=DataLoader(images(), batch_size),
        optimizers=torch.optim.SGD(network.parameters(), lr=lr),
        max_duration=duration,
        algorithms=[SqueezeExcite(4, 8)],
        callbacks=list(callbacks),
        loggers=[InMemoryLogger()],
        progress_bar=False,
        seed=1,
        **kwargs,
    )
    trainer.fit()
    return trainer


def logged(trainer: Trainer) -> dict[str, list[float]]:
    memory = next(d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger))
    return {key: [float(v) for _, v in log] for key, log in memory.data.items() if key.startswith("gates/")}


def gates_of_first_batch() -> dict[str, torch.Tensor]:
    """The gates of every layer for the first batch, by the plain formula."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str, wrapper: SqueezeExciteConv2d) -> None:
        w1, w2 = wrapper.se.parameters()

        def hook(conv: nn.Module, args: Any, u: torch.Tensor) -> None:
            seen[name] = torch.sigmoid(torch.relu(u.mean((2, 3)) @ w1.T) @ w2.T).detach()

        wrapper.conv.register_forward_hook(hook)

    class Watch(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            for name in LAYERS:
                watch(name, state.model.module.get_submodule(name))

    fit(Watch(), duration="1ba")
    return seen


def test_statistics_are_those_of_the_gates() -> None:
    logs = logged(fit(GateMonitor(), duration="1ba"))
    assert set(logs) == {f"gates/{statistic}/{layer}" for statistic in STATISTICS for layer in LAYERS}
    for name, gates in gates_of_first_batch().items():
        gates = gates.double()
        assert gates.shape[0] == 12
        expected = {
            "mean": gates.mean(),
            "std_over_samples": gates.var(0, correction=0).mean().sqrt(),
            "std_over_channels": gates.mean(0).std(correction=0),
            "share_near_0": (gates < NEAR).double().mean(),
            "share_near_1": (gates > 1 - NEAR).double().mean(),
        }
        for statistic, value in expected.items():
            assert logs[f"gates/{statistic}/{name}"] == [pytest.approx(float(value), abs=1e-6)]
        assert expected["std_over_samples"] > 1e-3


def test_sums_add_up_over_unequal_batches() -> None:
    logits = 6 * torch.randn(9, 5)
    mean, over_samples, over_channels, near_0, near_1 = describe(
        gate_sums(logits[:2], 1.0) + gate_sums(logits[2:], 1.0)
    ).tolist()
    gates = logits.double().sigmoid()
    assert mean == pytest.approx(float(gates.mean()))
    assert over_samples == pytest.approx(float(gates.var(0, correction=0).mean().sqrt()))
    assert over_channels == pytest.approx(float(gates.mean(0).std(correction=0)))
    assert near_0 == pytest.approx(float((gates < 0.05).double().mean()))
    assert near_1 == pytest.approx(float((gates > 0.95).double().mean()))
    assert min(near_0, near_1) > 0


def test_microbatches_count_as_one_batch() -> None:
    whole, split = (logged(fit(GateMonitor("2ba"), device_train_microbatch_size=size)) for size in (12, 5))
    assert whole.keys() == split.keys()
    for key, values in whole.items():
        assert split[key] == pytest.approx(values, abs=1e-5), key


def test_nothing_is_hooked_outside_observed_forward_passes() -> None:
    hooked: dict[str, list[int]] = {"train": [], "backward": [], "eval": []}

    class Watch(Callback):
        def count(self, state: State, when: str) -> None:
            modules = [module for block in se_blocks(state.model).values() for module in block.modules()]
            hooked[when].append(sum(len(module._forward_hooks) for module in modules))

        def before_forward(self, state: State, logger: Logger) -> None:
            self.count(state, "train")

        def before_backward(self, state: State, logger: Logger) -> None:
            self.count(state, "backward")

        def eval_before_forward(self, state: State, logger: Logger) -> None:
            self.count(state, "eval")

    trainer = fit(
        GateMonitor("3ba"), Watch(), duration="2ep", eval_dataloader=DataLoader(images(), 12), eval_interval="1ba"
    )
    assert hooked["train"] == [2, 0, 0, 2, 0, 0, 2, 0]
    assert not any(hooked["backward"])
    assert hooked["eval"]
    assert not any(hooked["eval"])
    assert all(len(values) == 3 for values in logged(trainer).values())


def test_evaluation_between_batches_changes_no_statistic() -> None:
    plain = logged(fit(GateMonitor("2ba")))
    evaluated = logged(fit(GateMonitor("2ba"), eval_dataloader=DataLoader(images(24), 24), eval_interval="1ba"))
    assert evaluated == plain


def test_in_observed_batches_norms_still_take_the_gates_along(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def spy(*args: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        return gated_norm(*args)

    gated_norm = ops.gated_norm
    monkeypatch.setattr(ops, "gated_norm", spy)
    fit(GateMonitor("1ba"), duration="3ba")
    assert taken == 3 * len(LAYERS)


def test_training_is_the_same_to_the_last_bit() -> None:
    with_monitor, without = (fit(*callbacks, duration="2ep").state.model for callbacks in ([GateMonitor("1ba")], []))
    for name, tensor in without.state_dict().items():
        assert torch.equal(with_monitor.state_dict()[name], tensor), name


def test_a_batch_that_is_run_again_is_counted_once() -> None:
    """Automatic microbatching starts a batch anew when a forward pass runs out of memory; its hooks are still there."""
    trainer = fit(duration="1ba")
    state, logger, monitor = trainer.state, trainer.logger, GateMonitor("1ba")
    batch = next(iter(DataLoader(images(), 12)))
    monitor.batch_start(state, logger)
    for size in (12, 7):
        monitor.before_train_batch(state, logger)
        monitor.before_forward(state, logger)
        state.model([batch[0][:size], batch[1][:size]])
    monitor.after_forward(state, logger)
    assert [float(sums[0]) for sums in monitor._sums.values()] == [7, 7]


def test_interval_in_epochs_observes_the_first_batch_of_each() -> None:
    steps = []

    class Watch(Callback):
        def before_backward(self, state: State, logger: Logger) -> None:
            steps.append(int(state.timestamp.batch))

    trainer = fit(GateMonitor("2ep"), Watch(), duration="5ep")
    memory = trainer.logger.destinations[0]
    assert isinstance(memory, InMemoryLogger)
    assert [int(time.batch) for time, _ in memory.data["gates/mean/0"]] == [1, 9, 17]


@pytest.mark.parametrize("interval", ["0ba", "10sp", -1])
def test_interval_is_checked(interval: Any) -> None:
    with pytest.raises(ValueError, match="give a number of batches or epochs"):
        GateMonitor(interval)


class SetWeights(Callback):
    """Gives the first layer's block weights that make its gates constant, or saturate them."""

    def __init__(self, first: float, second: float) -> None:
        self.weights = first, second

    def fit_start(self, state: State, logger: Logger) -> None:
        mlp = state.model.module.get_submodule("0").se.pool_and_mlp
        nn.init.constant_(mlp["2"].weight, self.weights[0])
        nn.init.constant_(mlp["4"].weight, self.weights[1])
        with torch.no_grad():
            # Some hidden unit is active whatever the sign of the mean map, so that every gate is far from 1/2.
            mlp["2"].weight[::2] *= -1


@pytest.mark.parametrize(
    ("first", "second", "word"), [(0.0, 1.0, "constant"), (1e4, 1e4, "saturated")], ids=["constant", "saturated"]
)
def test_warns_once_of_gates_that_do_nothing(
    caplog: pytest.LogCaptureFixture, first: float, second: float, word: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="composer_se"):
        fit(SetWeights(first, second), GateMonitor("1ba"), duration="2ep", lr=0.0)
    messages = [
        r.getMessage() for r in caplog.records if r.name == "composer_se.gate_monitor" and word in r.getMessage()
    ]
    assert len(messages) == 1
    assert "The gates of 0 are" in messages[0]


def test_learning_gates_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="composer_se"):
        fit(GateMonitor("1ba"), duration="2ep")
    assert not [record for record in caplog.records if record.name == "composer_se.gate_monitor"]


def test_a_model_without_blocks_logs_nothing() -> None:
    network = small_network()
    trainer = Trainer(
        model=ComposerClassifier(network, num_classes=10),
        train_dataloader=DataLoader(images(), 12),
        optimizers=torch.optim.SGD(network.parameters(), lr=0.1),
        max_duration="1ba",
        callbacks=[GateMonitor("1ba")],
        loggers=[InMemoryLogger()],
        progress_bar=False,
    )
    trainer.fit()
    assert logged(trainer) == {}


def test_a_compiled_model_is_observed() -> None:
    compiled = logged(fit(GateMonitor("2ba"), compile_config={"backend": "eager"}))
    for key, values in logged(fit(GateMonitor("2ba"))).items():
        assert compiled[key] == pytest.approx(values, abs=1e-5), key


@pytest.mark.launch
def test_two_processes_log_what_one_does(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    target = tmp_path / "gates.json"
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", "2"]
    script = [str(root / "tests" / "two_process_gates.py"), str(target)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        launcher + script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    two, one = json.loads(target.read_text()), train()
    assert set(one) == {f"gates/{statistic}/{layer}" for statistic in STATISTICS for layer in LAYERS}
    for key, values in one.items():
        assert len(values) == 3
        assert two[key] == pytest.approx(values, abs=1e-5), key
