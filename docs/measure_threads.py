"""Measures how long a run takes with different numbers of threads and ways to wait.

    make threads

Runs two recipes with each setting, in random order, on a machine left alone and beside a program that takes one core.
Writes `results/threads.json`. Run `write_tables.py` afterwards.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from composer_se.launch import available_cores
from composer_se.measure.machine import describe_machine
from composer_se.show.text import to_json

RESULT = Path(__file__).parent / "results" / "threads.json"
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "all cores, `PASSIVE`": {"OMP_WAIT_POLICY": "PASSIVE"},
    "all cores, `ACTIVE`": {"OMP_WAIT_POLICY": "ACTIVE"},
}
RUNS = {
    "`digits`, six epochs": ("digits", "max_duration=6ep"),
    "ResNet-18, 32 steps on 32 images of 64 × 64 pixels": (
        "synthetic_resnet50",
        "model.name=resnet18",
        "train_dataset.image_size=64",
        "train_batch_size=32",
        "max_duration=32ba",
    ),
}
ROUNDS = 5


def seconds(recipe: tuple[str, ...], setting: dict[str, str], busy: bool) -> float:
    """The time of a run from start to end, in an environment without other settings of OpenMP."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "COMPOSER_SE_"))}
    if setting and "OMP_NUM_THREADS" not in setting:
        environment["OMP_NUM_THREADS"] = str(available_cores())
    spin = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    other = subprocess.Popen([sys.executable, "-c", spin]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            command = [sys.executable, "-m", "composer_se.train", *recipe, f"run_folder={folder}"]
            done = subprocess.run(command, env=environment | setting, check=False, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            return time.perf_counter() - start
    finally:
        if other:
            other.kill()
            other.wait()


def main() -> None:
    """Measures all settings in turn."""
    turns = [(run, busy, name) for run in RUNS for busy in (False, True) for name in SETTINGS]
    times: dict[tuple[str, bool, str], list[float]] = {turn: [] for turn in turns}
    machine = describe_machine(torch.device("cpu"))
    shuffle = random.Random(0).shuffle
    for _ in range(ROUNDS):
        shuffle(turns)
        for run, busy, name in turns:
            times[run, busy, name].append(seconds(RUNS[run], SETTINGS[name], busy))
    rows = [{"run": run, "busy": busy, "setting": name, "seconds": t} for (run, busy, name), t in times.items()]
    RESULT.write_text(to_json({"machine": vars(machine), "rows": rows}))


if __name__ == "__main__":
    main()
