"""`composer-se compare` from the command line: real runs, real kills, the launcher."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from composer import State
from recipe_runs import environment

from composer_se.cli import main
from composer_se.compare import kept_speeds, speed
from composer_se.compare.arms import Arm, Comparison, lengthened, run_recipes
from composer_se.compare.outcomes import Outcome, keep_outcome, kept_outcome
from composer_se.compare.run import check
from composer_se.errors import UserError
from composer_se.measure.uncertainty import pairs_needed
from composer_se.recipe.run import train
from composer_se.recipe.trainer import build_parts, make_trainer
from composer_se.recipe.validate import make_plan

# Digits at their smallest: 5 batches of 16 images per epoch.
TINY = ("model.name=cifar_resnet8", "train_batch_size=16", "train_subset_num_batches=5", "max_duration=2ep")


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(kept_speeds, "ROUNDS", 2)
    monkeypatch.setattr(speed, "TURN_SECONDS", 0.1)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of one seed. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        prepare(folder, patch)
        assert compare("--seeds", "1") == 0
    return folder / "out"


def comparison(*arms: Arm, seeds: int = 1, overrides: tuple[str, ...] = TINY) -> Comparison:
    return Comparison("digits", overrides, arms, seeds, Path("out"))


def compare(*arguments: str) -> int:
    return main(["compare", "digits", *TINY, "--out", "out", *arguments])


def test_a_comparison_prints_a_table_of_80_columns_and_leaves_report_picture_and_data(capsys) -> None:
    assert compare("--seeds", "2") == 0
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    assert "plain" in printed
    assert "with SE" in printed
    assert "2 seeds per arm" in printed
    found = json.loads(Path("out/results.json").read_text())
    assert [len(runs) for runs in found["runs"].values()] == [2, 2]
    assert [run["seed"] for run in found["runs"]["plain"]] == [17, 18]
    assert [run["se_layers"] for runs in found["runs"].values() for run in runs] == [0, 0, 2, 2]
    assert all(len(s["step"]) == 2 and min(s["step"] + s["latency"]) > 0 for s in found["speeds"].values())
    for run in found["other_lengths"]:  # trained for as long as the slower arm, by the speeds measured
        steps = {name: sum(s["step"]) for name, s in found["speeds"].items()}
        ratio = steps["with SE"] / steps["plain"]
        assert run["batches"] == max(1, round(10 * ratio))
    assert Path("out/comparison.png").stat().st_size > 10_000
    assert "plain-seed17" in Path("out/results.md").read_text()


def test_no_seeds_measure_speeds_and_train_nothing(capsys) -> None:
    assert compare("--seeds", "0") == 0
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    assert "with SE" in printed
    assert [path.name for path in Path("out").iterdir()] == ["speeds.json"]


def test_a_pilot_trains_two_seeds_apart_and_says_how_many_a_comparison_needs(capsys) -> None:
    assert compare("--pilot", "5") == 0
    said = " ".join(capsys.readouterr().out.split())
    outcomes = {path.stem: json.loads(path.read_text())["outcome"] for path in Path("out/outcomes").iterdir()}
    seeds = range(1017, 1019)
    assert outcomes.keys() == {f"{arm}-seed{seed}" for arm in ("plain", "with-se") for seed in seeds}
    final = {name: outcome["accuracies"][-1][1] for name, outcome in outcomes.items()}
    a, b = (final[f"with-se-seed{seed}"] - final[f"plain-seed{seed}"] for seed in seeds)
    assert f"scatter by {100 * abs(a - b) / math.sqrt(2):.2f} points" in said
    assert f"about {pairs_needed(0.05, abs(a - b) / math.sqrt(2), 0.8)} an 80 % chance" in said
    written = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.json")}
    assert compare("--pilot", "5") == 0
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.json")} == written
    assert compare("--seeds", "1") == 0
    assert [run["seed"] for run in json.loads(Path("out/results.json").read_text())["runs"]["plain"]] == [17]


def test_speeds_are_kept_round_by_round_and_measured_on_from_there(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    take_turn = kept_speeds.take_turn

    def take(name: str, *arguments) -> speed.Turn:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(name)
        return take_turn(name, *arguments)

    monkeypatch.setattr(kept_speeds, "take_turn", take)
    assert compare("--seeds", "0") == 130
    assert "turn 3 of 4" in capsys.readouterr().err
    first = json.loads(Path("out/speeds.json").read_text())
    assert [len(entry["speed"]["step"]) for entry in first.values()] == [1, 1]
    taken.clear()
    assert compare("--seeds", "0") == 0
    assert sorted(taken) == ["plain", "with SE"]
    for name, entry in json.loads(Path("out/speeds.json").read_text()).items():
        assert entry["speed"]["step"][:1] == first[name]["speed"]["step"]
        assert len(entry["speed"]["step"]) == len(entry["speed"]["latency"]) == 2


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(
    capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_speeds, "take_turn", lambda *_: pytest.fail("measured"))
    Path("out").write_text("a file")
    assert compare("--seeds", "1") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("composer-se compare: error: --out out: can't be written (Not a directory)")
    assert "make room" not in error


def test_more_seeds_and_arms_later_leave_the_runs_and_speeds_before_as_they_are(compared: Path) -> None:
    shutil.copytree(compared, "out", symlinks=True)
    before = json.loads(Path("out/results.json").read_text())
    stamp = Path("out/runs/plain-seed17/summary.json").stat().st_mtime_ns
    wide = ["--arm", "wide", "algorithms.squeeze_excite.min_channels=1"]
    arms = ["--arm", "plain", "algorithms.squeeze_excite=null", "--arm", "with SE", *wide]
    assert compare("--seeds", "2", *arms) == 0
    after = json.loads(Path("out/results.json").read_text())
    assert Path("out/runs/plain-seed17/summary.json").stat().st_mtime_ns == stamp
    assert {name: after["speeds"][name] for name in before["speeds"]} == before["speeds"]
    assert after["runs"]["plain"][:1] == before["runs"]["plain"]
    assert [len(runs) for runs in after["runs"].values()] == [2, 2, 2]
    assert after["runs"]["wide"][0]["se_layers"] == 7


def test_another_recipe_or_a_damaged_file_in_the_folder_is_refused(compared: Path, capsys) -> None:
    shutil.copytree(compared, "out", symlinks=True)
    for change in ("max_duration=3ep", "optimizer.lr=0.3", "eval_subset_num_batches=1"):
        assert main(["compare", "digits", *TINY, change, "--seeds", "1", "--out", "out"]) == 2
        error = capsys.readouterr().err
        assert "out/outcomes/plain-seed17.json: belongs to another recipe" in error
        assert change.partition("=")[0] in error
    speeds = Path("out/speeds.json")
    speeds.write_text(speeds.read_text()[:-20])
    assert compare("--seeds", "1") == 2
    assert "out/speeds.json: is damaged" in capsys.readouterr().err
    speeds.unlink()
    Path("out/outcomes/with-se-seed17.json").unlink()
    metrics = Path("out/runs/with-se-seed17/metrics.jsonl")
    metrics.write_text(f"garbled {metrics.read_text()}")
    assert compare("--seeds", "1") == 2
    assert f"{metrics}: line 1 is damaged" in capsys.readouterr().err
    Path("out/outcomes/plain-seed17.json").write_text("{}")
    assert compare("--seeds", "1") == 2
    assert "out/outcomes/plain-seed17.json: is damaged" in capsys.readouterr().err
    Path("out/outcomes/plain-seed17.json").unlink()
    shutil.rmtree("out/runs")  # of no more use once complete
    assert compare("--seeds", "1") == 0


def test_outcomes_of_a_version_that_knew_fewer_keys_are_read() -> None:
    recipe = run_recipes(comparison(Arm("plain", ())), 0)["plain"]
    kept = Outcome("plain-seed17", 17, 10, ((10, 0.5),), 1.0, 100, 0)
    keep_outcome(kept, recipe, Path("out"))
    path = Path("out/outcomes/plain-seed17.json")
    content = json.loads(path.read_text())
    del content["recipe"]["step_schedulers_every_batch"], content["recipe"]["scale_schedule_ratio"]
    path.write_text(json.dumps(content))
    assert kept_outcome(recipe, Path("out")) == kept


def test_speeds_of_another_kind_of_machine_are_not_added_to(capsys) -> None:
    assert compare("--seeds", "0") == 0
    speeds = Path("out/speeds.json")
    content = json.loads(speeds.read_text())
    content["plain"]["machine"]["gpu"] = "some GPU"
    speeds.write_text(json.dumps(content))
    assert compare("--seeds", "0") == 0  # nothing to add
    capsys.readouterr()
    arms = (
        "--arm",
        "plain",
        "algorithms.squeeze_excite=null",
        "--arm",
        "wide",
        "algorithms.squeeze_excite.min_channels=1",
    )
    assert compare("--seeds", "0", *arms) == 2
    assert "out/speeds.json: was measured on 1 process(es), some GPU" in capsys.readouterr().err


def test_networks_and_data_workers_of_ended_runs_are_let_go() -> None:
    gc.collect()
    before = {id(each) for each in gc.get_objects() if type(each) is State}
    workers = ("eval_dataset.num_workers=1", "train_dataset.num_workers=1")
    assert main(["compare", "digits", *TINY, *workers, "--seeds", "1", "--out", "out"]) == 0
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is State and id(each) not in before]
    assert not multiprocessing.active_children()


def test_paths_in_a_recipe_follow_the_run() -> None:
    log_dir = "loggers.tensorboard={log_dir: '${run_folder}/tb'}"
    asked = comparison(Arm("plain", ()), Arm("other", ("optimizer.lr=0.05",)), overrides=(*TINY, log_dir))
    dirs = [(recipe.loggers or {})["tensorboard"]["log_dir"] for recipe in run_recipes(asked, 1).values()]
    assert dirs == ["out/runs/plain-seed18/tb", "out/runs/other-seed18/tb"]
    longer = lengthened(asked, 1, 10, 12)
    assert (
        (longer.loggers or {})["tensorboard"]["log_dir"] == f"{longer.run_folder}/tb" == "out/runs/plain-12ba-seed18/tb"
    )


@pytest.mark.parametrize(
    ("max_duration", "batches"), [("8ep", [5, 15, 25, 35]), ("16ba", [2, 6, 10, 14]), ("256sp", [2, 6, 10, 14])]
)
def test_turns_are_spread_over_the_duration(max_duration: str, batches: list[int]) -> None:
    overrides = (*TINY, f"max_duration={max_duration}", "scheduler=null")
    recipe = run_recipes(comparison(Arm("plain", ()), overrides=overrides), 0)["plain"]
    trainer = make_trainer(build_parts(recipe, make_plan(recipe)), max_duration=max_duration, progress_bar=False)
    trainer.close()
    shares = (0.125, 0.375, 0.625, 0.875)
    assert [int(speed._at(share, trainer.state, 5, 16).batch) for share in shares] == batches


def test_callback_that_stops_early_can_be_left_out_as_the_complaint_says() -> None:
    stopper = "callbacks.early_stopper={monitor: x, dataloader_label: eval}"
    asked = comparison(Arm("a", ()), Arm("b", ()), overrides=(*TINY, stopper))
    with pytest.raises(UserError, match="leave it out with callbacks.early_stopper=null"):
        check(asked)
    check(dataclasses.replace(asked, overrides=(*asked.overrides, "callbacks.early_stopper=null")))


def test_runs_of_a_comparison_are_those_of_the_recipe_alone() -> None:
    assert compare("--seeds", "1") == 0
    from composer_se.recipe.load import load_recipe

    alone, _ = train(load_recipe("digits", [*TINY, "progress_bar=false"]))
    assert (
        json.loads(Path("out/runs/with-se-seed17/summary.json").read_text())["metrics"].pop("metrics/eval/CrossEntropy")
        == alone["metrics"]["metrics/eval/CrossEntropy"]
    )


def test_arms_share_initial_weights_and_images_in_the_same_order() -> None:
    recipes = run_recipes(comparison(Arm("plain", ("algorithms.squeeze_excite=null",)), Arm("se", ()), seeds=2), 1)
    built = [build_parts(recipe, make_plan(recipe)) for recipe in recipes.values()]
    assert {recipe.seed for recipe in recipes.values()} == {18}
    for one, other in zip(*(parts.network.state_dict().values() for parts in built), strict=True):
        assert torch.equal(one, other)
    batches = [next(iter(parts.train_loader)) for parts in built]
    assert torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[0][1], batches[1][1])


@pytest.mark.parametrize("max_duration", ["2ep", "10ba", "160sp"])
@pytest.mark.parametrize("batches", [7, 13])
def test_run_of_another_length_takes_that_many_steps_and_anneals_to_its_end(max_duration: str, batches: int) -> None:
    asked = comparison(Arm("plain", ()), overrides=(*TINY, f"max_duration={max_duration}"))
    summary, _ = train(lengthened(asked, 0, 10, batches))
    assert summary["batch"] == batches
    lines = [json.loads(line) for line in Path(summary["run_folder"], "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr-SGD/group0"] for line in lines if "lr-SGD/group0" in line]
    assert len(rates) == batches
    after_warmup = batches - 5
    assert rates[-1] == pytest.approx(0.1 * (1 + math.cos(math.pi * (after_warmup - 1) / after_warmup)) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "-1"], "--seeds -1"),
        (["--pilot", "0"], "--pilot 0.0: expected percentage points"),
        (["--pilot", "nan"], "--pilot nan: expected percentage points"),
        (["--arm", "a", "optimizer.lr=1"], "one arm is nothing"),
        (["--arm", "a", "--arm", "A!"], "two arms have this name"),
        (["--arm", "a", "--arm", "optimizer.lr=1"], "write --arm NAME"),
        (["--arm", "a", "--arm", "b", "seed=3"], "--arm b: seed is set by the comparison"),
        (["--arm", "a", "--arm", "b", "optimizer.lrr=3"], "--arm b: optimizer.lrr"),
        (["--arm", "a", "--arm", "b", "eval_dataset=null"], "--arm b: eval_dataset is null"),
        (["--arm", "a", "--arm", "b", "eval_interval=0ep"], "--arm b: eval_interval"),
        (["--arm", "a", "--arm", "b", "max_duration=3ep"], "--arm b: max_duration is '3ep', but '2ep' in a"),
        (["--arm", "a [/b]", "--arm", "b"], "a name is made of"),
        (["--arm", "a", "--arm", "b", "train_batch_size=32"], "--arm b: train_batch_size is 32, but 16 in a"),
        (
            ["--arm", "a", "--arm", "b", "callbacks.early_stopper={monitor: x, dataloader_label: eval}"],
            "would end runs",
        ),
        (["run_name=x"], "error: run_name is set by the comparison"),
        (
            ["--arm", "a", "--arm", "b", "algorithms.squeeze_excite.include=blocks*"],
            "algorithms.squeeze_excite.include: include",
        ),
    ],
)
def test_a_wrong_argument_is_named_in_one_line_and_nothing_is_written(arguments, message, capsys) -> None:
    shared, options = (arguments, []) if "=" in arguments[0] else ([], arguments)
    assert main(["compare", "digits", *TINY, *shared, "--out", "out", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("out").exists()


def test_overrides_may_stand_anywhere_among_the_options() -> None:
    from composer_se.cli import make_parser, parse

    words = ["compare", "digits", "seed=1", "--seeds", "3", "max_duration=2ep", "--out", "out", "model.num_classes=3"]
    args = parse(make_parser(), [*words, "--arm", "a", "seed=4", "--arm", "b", "seed=5"])
    assert (args.recipe, args.seeds) == ("digits", 3)
    assert args.overrides == ["seed=1", "max_duration=2ep", "model.num_classes=3"]
    assert args.arm == [["a", "seed=4"], ["b", "seed=5"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1", "max_duration"], "unrecognized arguments: max_duration"),
        (["--seeds", "1", "--pilot", "0.2"], "--pilot: not allowed with argument --seeds"),
    ],
)
def test_a_word_that_has_no_meaning_there_is_refused(words, message, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare(*words)
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def command(*arguments: str, processes: int | None = None) -> list[str]:
    words = [str(Path(__file__).parent / "short_compare.py"), "digits", *TINY, "--out", "out", *arguments]
    if processes is None:
        return [sys.executable, *words]
    return [str(Path(sys.executable).parent / "composer"), "-n", str(processes), *words]


@pytest.mark.launch
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_comparison_continues_to_the_same_result(stop: signal.Signals, tmp_path: Path) -> None:
    arguments = ("--seeds", "1")
    process = subprocess.Popen(command(*arguments), env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out/runs/with-se-seed17/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or metrics.read_text().count("\n") < 7:  # in the second arm's second epoch
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, stop)
    _, error = process.communicate(timeout=60)
    if stop is signal.SIGINT:
        assert process.returncode == 130
        assert "the same command continues" in error
    speeds = (tmp_path / "out/speeds.json").read_text()
    assert compare(*arguments) == 0
    assert (tmp_path / "out/speeds.json").read_text() == speeds
    found = json.loads((tmp_path / "out/results.json").read_text())

    undisturbed = run_recipes(comparison(Arm("with SE", ()), seeds=1), 0)["with SE"]
    summary, was_complete = train(undisturbed)
    assert was_complete
    other = run_recipes(Comparison("digits", TINY, (Arm("with SE", ()),), 1, Path("elsewhere")), 0)["with SE"]
    fresh, _ = train(other)
    assert summary["metrics"]["metrics/eval/CrossEntropy"] == fresh["metrics"]["metrics/eval/CrossEntropy"]
    assert found["runs"]["with SE"][0]["accuracies"][-1][1] == fresh["metrics"]["metrics/eval/MulticlassAccuracy"]


@pytest.mark.launch
def test_a_comparison_under_the_launcher(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--seeds", "1", processes=2),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 seed per arm") == 1
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert [run["batches"] for runs in found["runs"].values() for run in runs] == [10, 10]


def test_a_folder_may_have_any_character_in_its_name() -> None:
    arms = (Arm("one", ()), Arm("two", ()))
    recipes = run_recipes(Comparison("digits", (), arms, 1, Path("😀")), 0)
    assert recipes["one"].run_folder == "😀/runs/one-seed17"
