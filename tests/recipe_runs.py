"""Runs recipes as a user does: in processes of their own, in an empty folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent

# Digits at their smallest: 5 batches of 16 images per epoch.
TINY = ("model.name=cifar_resnet20", "train_batch_size=16", "train_subset_num_batches=5", "progress_bar=false")


def command(*arguments: str, processes: int | None = None) -> list[str]:
    """The command line: `python -m` for None, the launcher for a number of processes."""
    if processes is None:
        return [sys.executable, "-m", "composer_se.train", *arguments]
    launcher = str(Path(sys.executable).parent / "composer")
    return [launcher, "-n", str(processes), "-m", "composer_se.train", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train(folder: Path, *arguments: str, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, processes=processes),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train_until(
    folder: Path,
    lines: int,
    stop: signal.Signals,
    *arguments: str,
    processes: int | None = None,
    run_name: str = "digits",
) -> str:
    """Trains until metrics.jsonl of the run has so many lines, then sends a signal to all processes."""
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command(*arguments, processes=processes),
            cwd=folder,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    metrics = folder / "runs" / run_name / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or metrics.read_text().count("\n") < lines:
        assert process.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < deadline, (folder / "output.txt").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, stop)
    process.wait(timeout=60)
    return (folder / "output.txt").read_text()


def final_state(folder: Path, run_name: str = "digits") -> dict[str, Any]:
    checkpoint = folder / "runs" / run_name / "checkpoints" / "latest-rank0.pt"
    return torch.load(checkpoint, weights_only=False)["state"]


def assert_same_weights(first: dict, second: dict) -> None:
    assert first["model"].keys() == second["model"].keys()
    for name, weight in first["model"].items():
        assert torch.equal(weight, second["model"][name]), name
    one, other = first["optimizers"]["SGD"]["state"], second["optimizers"]["SGD"]["state"]
    assert one.keys() == other.keys()
    for name, state in one.items():
        assert torch.equal(state["momentum_buffer"], other[name]["momentum_buffer"]), name
