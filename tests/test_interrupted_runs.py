"""Damaged checkpoints and full disks: one line that says how to go on, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from composer import Callback
from recipe_runs import TINY, command, environment, final_state, train

from composer_se.recipe.checkpoints import check_latest
from composer_se.recipe.load import load_recipe
from composer_se.recipe.run import exit_code_of
from composer_se.recipe.run import train as train_here
from composer_se.train import main

pytestmark = pytest.mark.launch

# Checkpoints after batches 2, 4 and 5, of which the last two are kept.
RUN = ("digits", *TINY, "eval_dataset=null", "save_interval=2ba", "device=cpu")
ONE_EPOCH = (*RUN, "max_duration=1ep")
LONGER = (*RUN, "max_duration=6ba")
CHECKPOINTS = Path("runs/digits/checkpoints")
LATEST, BEFORE = CHECKPOINTS / "ep1-ba5-rank0.pt", CHECKPOINTS / "ep0-ba4-rank0.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(ONE_EPOCH) == 0
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cut_short(checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])


def flip_a_bit(checkpoint: Path) -> None:
    """In the weights, where torch.load doesn't notice."""
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    torch.load(checkpoint, weights_only=False)


def empty(checkpoint: Path) -> None:
    checkpoint.write_bytes(b"")


def garble_the_end(checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:-200] + b"\0" * 200)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty, garble_the_end, Path.unlink])
def test_damaged_latest_checkpoint_is_named_with_the_command_that_continues_from_the_one_before(
    copied: Path, damage: Callable[[Path], object], capfd: pytest.CaptureFixture[str]
) -> None:
    damage(LATEST)
    assert main(LONGER) == 2
    message = capfd.readouterr().err.strip()
    assert message.startswith(f"composer_se.train: error: {LATEST}: the latest checkpoint is damaged (")
    assert "\n" not in message
    assert str(BEFORE) in message
    assert main(LONGER) == 2  # nothing has changed
    mend = re.search(r"`(.+)`", message)
    assert mend
    subprocess.run(mend[1], shell=True, check=True)
    check_latest(CHECKPOINTS)
    assert (CHECKPOINTS / "latest-rank0.pt").resolve() == BEFORE.resolve()


def test_run_continues_from_the_checkpoint_before_the_damaged_one(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("runs/digits/summary.json").unlink()  # the run was killed before it was complete
    weights = torch.load(LATEST, weights_only=False)["state"]["model"]
    cut_short(LATEST)
    assert main(ONE_EPOCH) == 2
    mend = re.search(r"`(.+)`", capfd.readouterr().err)
    assert mend
    subprocess.run(mend[1], shell=True, check=True)
    assert main(ONE_EPOCH) == 0
    assert "epoch 0, batch 4" in capfd.readouterr().err
    again = final_state(copied)["model"]
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def test_damaged_checkpoint_with_no_whole_one_before_it_says_so(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cut_short(LATEST)
    cut_short(BEFORE)
    assert main(LONGER) == 2
    message = capfd.readouterr().err.strip()
    assert "holds no other that is whole" in message
    assert f"`rm {CHECKPOINTS / 'latest-rank0.pt'}`" in message
    assert "\n" not in message


def test_complete_run_with_a_damaged_checkpoint_is_still_complete(copied: Path) -> None:
    cut_short(LATEST)
    assert main(ONE_EPOCH) == 0


def test_run_killed_between_a_checkpoint_and_its_link_continues(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (CHECKPOINTS / "latest-rank0.pt").unlink()
    shutil.copy(LATEST, CHECKPOINTS / "ep1-ba6-rank0.pt")
    cut_short(CHECKPOINTS / "ep1-ba6-rank0.pt")  # a later one that was cut short doesn't count
    assert main((*RUN, "max_duration=7ba")) == 0
    said = capfd.readouterr().err
    assert f"points to {LATEST.name} again" in said
    assert "epoch 1, batch 5" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint of 3 MB."""
    disk = tmp_path / "runs"
    disk.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if mounted.returncode:
        pytest.skip(f"a file system of its own can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def assert_one_line_about_a_failed_write(done: subprocess.CompletedProcess[str], checkpoint: str, intact: str) -> None:
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "Traceback" not in output
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith(f"composer_se.train: error: {CHECKPOINTS / checkpoint}: can't be written (")
    assert f"MB free in {CHECKPOINTS}" in line
    assert line.endswith(f"continues from {intact}, which is intact")


def test_full_disk_leaves_the_checkpoint_before(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    done = train(tmp_path, *ONE_EPOCH)
    assert_one_line_about_a_failed_write(done, "ep0-ba4-rank0.pt", "ep0-ba2-rank0.pt")
    assert "No space left on device" in done.stderr
    monkeypatch.chdir(tmp_path)
    assert sorted(path.name for path in CHECKPOINTS.iterdir()) == ["ep0-ba2-rank0.pt", "latest-rank0.pt"]
    assert final_state(tmp_path)["timestamp"]["Timestamp"]["batch"] == 2
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert main(ONE_EPOCH) == 0
    assert "epoch 0, batch 2" in capfd.readouterr().err


def test_checkpoint_that_can_not_be_written_leaves_the_one_before(copied: Path) -> None:
    limited = ["sh", "-c", 'ulimit -f 1024 && exec "$@"', "sh", *command(*LONGER)]  # half a megabyte, in sh's blocks
    done = subprocess.run(
        limited, cwd=copied, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert_one_line_about_a_failed_write(done, "ep1-ba6-rank0.pt", LATEST.name)
    assert "File too large" in done.stderr
    check_latest(CHECKPOINTS)
    assert not (CHECKPOINTS / "ep1-ba6-rank0.pt").exists()


class _SignalWhenPickled:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGINT)
        return int, ()


class _InterruptsTheFirstCheckpoint(Callback):
    def state_dict(self):
        return {"signal": _SignalWhenPickled()}


def test_a_signal_in_the_middle_of_a_checkpoint_leaves_no_file_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("digits", [*TINY, "max_duration=2ep"])
    assert exit_code_of(lambda: train_here(recipe, [_InterruptsTheFirstCheckpoint()]), tmp_path) == 130
    assert not list(Path(recipe.save_folder).glob("*.pt"))
    summary, _ = train_here(recipe)
    assert summary["batch"] == 10


def test_the_launchers_sigterm_after_ctrl_c_does_not_break_off_what_ctrl_c_began(tmp_path: Path) -> None:
    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    assert exit_code_of(interrupted, tmp_path) == 130
    os.kill(os.getpid(), signal.SIGTERM)  # before the user was told how to go on


@pytest.mark.parametrize("max_duration", ["2ep", "10ba"])
def test_a_run_stopped_in_its_last_evaluation_evaluates_and_is_complete(
    max_duration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("digits", [*TINY, f"max_duration={max_duration}"])
    expected, _ = train_here(recipe)
    metrics, summary = Path(recipe.run_folder, "metrics.jsonl"), Path(recipe.run_folder, "summary.json")
    lines = metrics.read_text().splitlines(keepends=True)
    assert "metrics/eval" in lines[-1]
    metrics.write_text("".join(lines[:-1]) + lines[-1][:9])  # cut short, as by a kill
    summary.unlink()
    again, was_complete = train_here(recipe)
    assert not was_complete
    accuracy = "metrics/eval/MulticlassAccuracy"
    assert again["metrics"][accuracy] == expected["metrics"][accuracy]
    assert again["batch"] == 10
    assert json.loads(metrics.read_text().splitlines()[-1])[accuracy] == expected["metrics"][accuracy]
    assert summary.is_file()
