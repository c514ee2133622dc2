"""Runs of several processes, runs that are killed, and runs that are complete."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipe_runs import TINY, assert_same_weights, environment, final_state, train, train_until

import composer_se
from composer_se.parts.data import digits
from composer_se.parts.loaders import SeededImages
from composer_se.parts.models import build_network

pytestmark = pytest.mark.launch


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs/digits/metrics.jsonl").read_text().splitlines()]


def positions(folder: Path) -> list[tuple]:
    return [(line["epoch"], line["batch"], sorted(line)) for line in read_lines(folder)]


def held_out_accuracy(weights: dict) -> float:
    """What one process measures, with plain PyTorch."""
    network = build_network("cifar_resnet20", in_channels=1)
    composer_se.apply_squeeze_excite(network, min_channels="auto")
    network.load_state_dict({name.rpartition("module.")[2]: weight for name, weight in weights.items()})
    data = digits(train=False)
    images, labels = zip(*SeededImages(data.images, data.transform, seed=0).__getitems__(range(360)), strict=True)
    with torch.no_grad():
        return (network.eval()(torch.stack(images)).argmax(1) == torch.tensor(labels)).float().mean().item()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = train(folder, "digits", *TINY, "max_duration=3ep", "save_interval=2ba")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_run_leaves_its_folder_and_a_table(uninterrupted: Path) -> None:
    run = uninterrupted / "runs" / "digits"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "classes.json",
        "metrics.jsonl",
        "recipe.yaml",
        "report.html",
        "summary.json",
    ]
    lines = read_lines(uninterrupted)
    assert [line["batch"] for line in lines if "loss/train/total" in line] == list(range(1, 16))
    assert [line["batch"] for line in lines if "metrics/eval/MulticlassAccuracy" in line] == [5, 10, 15]
    assert lines[-1]["sample"] == 3 * 5 * 16
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["epoch"], summary["squeeze_excite_layers"]) == (3, 6)
    assert summary["parameters"] == 269_434 + summary["squeeze_excite_parameters"]


def test_run_killed_in_mid_epoch_ends_with_the_weights_of_one_never_killed(uninterrupted: Path, tmp_path: Path) -> None:
    arguments = ("digits", *TINY, "max_duration=3ep", "save_interval=2ba")
    train_until(tmp_path, 10, signal.SIGKILL, *arguments)  # in the second epoch
    assert not (tmp_path / "runs/digits/summary.json").exists()
    resumed = train(tmp_path, *arguments)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "continuing runs/digits" in resumed.stderr
    assert "Traceback" not in resumed.stderr
    assert "Warning" not in resumed.stderr
    assert_same_weights(final_state(uninterrupted), final_state(tmp_path))
    assert positions(uninterrupted) == positions(tmp_path)
    for one, other in zip(read_lines(uninterrupted), read_lines(tmp_path), strict=True):
        assert one.get("loss/train/total") == other.get("loss/train/total")


def test_complete_run_is_left_alone_and_can_be_extended(uninterrupted: Path) -> None:
    arguments = ("digits", *TINY, "save_interval=2ba")
    before = {path: path.stat().st_mtime_ns for path in (uninterrupted / "runs").rglob("*")}
    again = train(uninterrupted, *arguments, "max_duration=3ep")
    assert again.returncode == 0
    assert "max_duration=" in again.stderr
    assert "run_name=" in again.stderr
    assert "held-out accuracy" in again.stdout
    assert max(map(len, again.stdout.splitlines())) <= 80
    other = train(uninterrupted, *arguments, "max_duration=4ep", "optimizer.lr=0.2")
    assert other.returncode == 2
    assert "optimizer.lr (was 0.1, now 0.2)" in other.stderr
    assert "max_duration" not in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1
    assert before == {path: path.stat().st_mtime_ns for path in (uninterrupted / "runs").rglob("*")}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.parametrize(("set_by_user", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)])
def test_a_run_keeps_the_memory_that_tensors_free(set_by_user: dict[str, str], kept: bool, tmp_path: Path) -> None:
    code = f"""
import resource, torch
from composer_se.train import main
main({["digits", *TINY, "max_duration=1ba", "eval_dataset=null"]!r})
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for _ in range(10):
    before = faults()
    torch.ones(2**24)
    counts.append(faults() - before)
print(min(counts))"""
    command = [sys.executable, "-c", code]
    env = environment() | set_by_user
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    fewest = int(done.stdout.splitlines()[-1])
    assert (fewest < 1000) == kept  # of 16384 pages; other blocks may take a part of the free one at times


def test_interrupted_run_says_how_to_continue(tmp_path: Path) -> None:
    output = train_until(tmp_path, 7, signal.SIGINT, "digits", *TINY, "max_duration=300ep")
    assert "the same command continues" in output
    assert "Traceback" not in output


def test_interrupted_launch_says_how_to_continue_once(tmp_path: Path) -> None:
    output = train_until(tmp_path, 7, signal.SIGINT, "digits", *TINY, "max_duration=300ep", processes=2)
    assert output.count("the same command continues") == 1
    assert "Begin global rank" not in output  # the launcher shows nothing of the processes that the user doesn't watch


def test_two_processes_share_the_batch_and_end_with_equal_weights(tmp_path: Path) -> None:
    script = tmp_path / "watch.py"
    # The recipe's own entry point, with one thing more: each rank keeps the model it ended with.
    script.write_text(
        "import sys, torch\n"
        "from composer import Trainer\n"
        "from composer.utils import dist\n"
        "from composer_se.train import main\n"
        "close = Trainer.close\n"
        "def keep(self):\n"
        "    torch.save(self.state.model.state_dict(), f'rank{dist.get_global_rank()}.pt')\n"
        "    close(self)\n"
        "Trainer.close = keep\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    launcher = str(Path(sys.executable).parent / "composer")
    arguments = ["digits", *TINY, "max_duration=1ep"]
    done = subprocess.run(
        [launcher, "-n", "2", str(script), *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    lines = read_lines(tmp_path)
    assert [line["trainer/device_train_microbatch_size"] for line in lines[:5]] == [8] * 5
    assert lines[-1]["sample"] == 5 * 16
    assert lines[-1]["metrics/eval/MulticlassAccuracy"] == pytest.approx(held_out_accuracy(first), abs=1e-6)


def test_wrong_recipe_is_reported_once_by_two_processes(tmp_path: Path) -> None:
    done = train(tmp_path, "digits", "optimizer.lrr=1", processes=2)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("optimizer.lrr") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
