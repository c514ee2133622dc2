"""A wrong recipe is refused in one line that names the key, before anything is built or written."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from composer_se import launch
from composer_se.cli import exit_code
from composer_se.commands.train import run_recipe
from composer_se.errors import UserError, did_you_mean
from composer_se.recipe.load import load_recipe
from composer_se.recipe.run_folder import describe_changes
from composer_se.recipe.schema import Recipe, free_to_change, keys
from composer_se.recipe.trainer import try_network
from composer_se.recipe.validate import make_plan
from composer_se.train import main

GOOD = """
model: {name: cifar_resnet20, in_channels: 1}
train_dataset: {name: digits}
optimizer: {name: sgd, lr: 0.1}
max_duration: 1ba
train_batch_size: 16
"""

BAD_OVERRIDES = [
    ("optimizr.lr=1", "optimizr", "'optimizer'"),
    ("sed=1", "sed", "'seed'"),
    ("seed=abc", "seed", "abc"),
    ("seed=[1]", "seed", ""),
    ("train_batch_size=64 images", "train_batch_size", "expected a whole number, got '64 images'"),
    ("train_dataset=null", "train_dataset", "it can't be null"),
    ("optimizer.lr=nan", "optimizer.lr", "a number"),
    ("optimizer.lr=.nan", "optimizer.lr", "finite number"),
    ("optimizer.weight_decay=-.inf", "optimizer.weight_decay", "finite number"),
    ("optimizer={name: adamw, betas: [0.9, 1e999]}", "optimizer.betas[1]", "finite number"),
    ("scale_schedule_ratio=nan", "scale_schedule_ratio", "finite number"),
    ("optimizer.lr=-1", "optimizer.lr", "Invalid learning rate"),
    ("model.num_classes=-1", "model", "negative dimension -1"),
    ("train_dataset={name: synthetic, num_classes: 0}", "train_dataset", "must be 1 or more"),
    ("train_dataset={name: synthetic, image_size: -1}", "train_dataset", "must be 1 or more"),
    ("optimizer={name: adamw, betas: [2, 0.5]}", "optimizer.betas", "Invalid beta"),
    ("max_duration=5 parsecs", "max_duration", "90ep"),
    ("max_duration=0ep", "max_duration", "more than 0"),
    ("max_epochs=1", "max_epochs", "unknown key"),
    ("train_subset_num_batches=0", "train_subset_num_batches", "1 or more, or -1 for all"),
    ("eval_subset_num_batches=-5", "eval_subset_num_batches", "1 or more, or -1 for all"),
    ("max_duration=5sec", "max_duration", "5sec"),
    ("train_batch_size=0", "train_batch_size", "1 or more"),
    ("device_train_microbatch_size=auto", "device_train_microbatch_size", "GPU"),
    ("device_train_microbatch_size=many", "device_train_microbatch_size", "'many'"),
    ("device=gpu", "device", "CUDA"),
    ("device=gpux", "device", "'gpu'"),
    ("precision=amp_bf16", "precision", "fp32"),
    ("precision=fp23", "precision", "fp32"),
    ("load_path=nowhere.pt", "load_path", "nowhere.pt"),
    ("model.name=cifar_resnet21", "model.name", "'cifar_resnet"),
    ("model.name=resnet51", "model.name", "'resnet50'"),
    ("model={name: timm/resnet5O}", "model.name", "resnet50"),
    ("model.num_clases=3", "model.num_clases", "'num_classes'"),
    ("model={name: resnet18, zero_init_residal: true}", "model.zero_init_residal", "'zero_init_residual'"),
    ("model.num_classes=ten", "model.num_classes", "whole number"),
    ("model={num_classes: 3}", "model.name", "required"),
    ("train_dataset.name=digit", "train_dataset.name", "'digits'"),
    ("train_dataset.rot=x", "train_dataset.rot", ""),
    ("train_dataset.num_workers=-1", "train_dataset.num_workers", "-1"),
    ("train_dataset.train=false", "train_dataset.train", ""),
    ("train_dataset={name: imagenet, root: nowhere}", "train_dataset.root", "nowhere/train"),
    ("optimizer.name=sgdd", "optimizer.name", "'sgd'"),
    ("optimizer.momentun=0.9", "optimizer.momentun", "'momentum'"),
    ("optimizer.lr=fast", "optimizer.lr", "a number"),
    ("optimizer.params=[]", "optimizer.params", ""),
    ("optimizer={name: decoupled_sgdw}", "optimizer.lr", "required"),
    ("optimizer={name: adamw, betas: [0.9]}", "optimizer.betas", "list of 2"),
    ("scheduler={name: cosine}", "scheduler.name", "cosine_annealing"),
    ("scheduler={name: multi_step}", "scheduler.milestones", "required"),
    ("scheduler={name: cosine_annealing_with_warmup, t_warmup: 9sp}", "scheduler.t_warmup", "max_duration=1ba"),
    ("algorithms.blurpol={}", "algorithms.blurpol", "'blurpool'"),
    ("algorithms.blurpol=null", "algorithms.blurpol", "'blurpool'"),
    ("algorithms.blurpool=3", "algorithms.blurpool", "mapping"),
    ("algorithms.blurpool.min_chanels=3", "algorithms.blurpool.min_chanels", "'min_channels'"),
    ("algorithms.blurpool.replace_convs=3", "algorithms.blurpool.replace_convs", "true or false"),
    ("algorithms.gradient_clipping={}", "algorithms.gradient_clipping.clipping_type", "required"),
    ("algorithms.squeeze_excite.latent_channel=3", "algorithms.squeeze_excite.latent_channel", "'latent_channels'"),
    ("callbacks.lr_monitor.every=3", "callbacks.lr_monitor.every", "none"),
    ("loggers.wand={}", "loggers.wand", "wandb"),
    ("loggers.csv={}", "loggers.csv", "RUN_FOLDER/metrics.jsonl"),
    ("model.num_classes=3", "model.num_classes", "3 outputs, but train_dataset has 10 classes"),
    ("model={name: no.such.module:Net}", "model.name", "can't be imported"),
    ("model={name: json:nothing}", "model.name", "no function or class 'nothing'"),
    ("model={name: json:dumps}", "model.obj", "required"),
    ("seed", "seed", "key=value"),
    ("seed: 1={", "seed: 1", ""),
    ("run_name=${nothing}", "run_name", "nothing"),
]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("good.yaml").write_text(GOOD)
    return "good.yaml"


@pytest.mark.parametrize(("override", "key", "hint"), BAD_OVERRIDES)
def test_bad_override_is_refused_in_one_line(
    recipe: str, override: str, key: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([recipe, override]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert key in message
    assert hint in message
    assert [path.name for path in Path().iterdir()] == ["good.yaml"]


@pytest.mark.parametrize("value", ["0", "-1", ".nan", "3.5", "true", "wide"])
@pytest.mark.parametrize("key", ["latent_channels", "min_channels"])
def test_values_that_squeeze_excite_rejects_are_refused(recipe: str, key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"algorithms\.squeeze_excite\.{key}: "):
        run_recipe(recipe, [f"algorithms.squeeze_excite.{key}={value}"])
    assert [path.name for path in Path().iterdir()] == ["good.yaml"]


def test_pattern_that_matches_no_conv_is_refused(recipe: str) -> None:
    with pytest.raises(UserError, match=r"algorithms\.squeeze_excite.*'blocks\*'"):
        run_recipe(recipe, ["algorithms.squeeze_excite.include=blocks*"])
    assert [path.name for path in Path().iterdir()] == ["good.yaml"]


def test_refused_run_leaves_what_other_runs_wrote_meanwhile(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import composer

    other = Path("runs/other/checkpoints/latest-rank0.pt")

    class MeanwhileAnotherRunStarts(composer.Trainer):
        def __init__(self, **options: Any) -> None:
            other.parent.mkdir(parents=True)
            other.touch()
            super().__init__(**options)

    monkeypatch.setattr(composer, "Trainer", MeanwhileAnotherRunStarts)
    with pytest.raises(UserError, match=r"'blocks\*'"):
        run_recipe(recipe, ["algorithms.squeeze_excite.include=blocks*"])
    assert other.exists()
    assert not Path("runs/good").exists()


def test_run_leaves_the_logging_of_the_process_as_it_was(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("composer_se")
    monkeypatch.setattr(log, "handlers", [])
    before = (log.handlers.copy(), log.level, log.propagate)
    with pytest.raises(UserError):
        run_recipe(recipe, ["algorithms.squeeze_excite.include=blocks*"])
    assert (log.handlers, log.level, log.propagate) == before


def test_a_warm_up_in_epochs_of_a_duration_in_samples_is_refused(recipe: str) -> None:
    warmup = "scheduler={name: cosine_annealing_with_warmup, t_warmup: %s}"
    with pytest.raises(UserError, match=r"scheduler\.t_warmup: '1ep' .* max_duration=1000sp"):
        make_plan(load_recipe(recipe, ["max_duration=1000sp", warmup % "1ep"]))
    for comparable in ("0.1dur", "100sp"):
        make_plan(load_recipe(recipe, ["max_duration=1000sp", warmup % comparable]))


def test_a_complaint_of_the_scheduler_names_it(recipe: str) -> None:
    with pytest.raises(UserError, match="scheduler: Wall clock time"):
        run_recipe(recipe, ["scheduler={name: multi_step, milestones: [5sec]}", "progress_bar=false"])
    assert [path.name for path in Path().iterdir()] == ["good.yaml"]


def test_tensorboard_writes_into_the_run_folder_unless_told_otherwise(recipe: str) -> None:
    for given, expected in (("{}", "runs/good/tensorboard"), ("{log_dir: elsewhere}", "elsewhere")):
        (logger,) = make_plan(load_recipe(recipe, [f"loggers.tensorboard={given}"])).loggers
        assert logger.arguments["log_dir"] == expected


def test_a_recipe_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert capsys.readouterr().err.endswith("the following arguments are required: RECIPE\n")


def test_network_for_other_images_is_refused(recipe: str) -> None:
    with pytest.raises(UserError, match=r"model: resnet18 does not take the images .* 1 channels and 8x8 pixels"):
        run_recipe(recipe, ["model={name: resnet18, num_classes: 10}"])
    assert [path.name for path in Path().iterdir()] == ["good.yaml"]


def test_trying_a_network_on_an_image_leaves_every_module_in_its_mode() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2).eval(), nn.Sequential(nn.ReLU()))
    for image in (torch.zeros(1, 8, 8), torch.zeros(3, 8, 8)):
        with contextlib.suppress(UserError):
            try_network(network, image, "network")
        assert [module.training for module in network.modules()] == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: [1, 2", "line 2, column 1"),
        ("model: {name: a}\nmodel: {name: b}", "line 2"),
        ("", "mapping"),
        ("- a\n- b", "mapping"),
        ("model: {name: cifar_resnet20}", "train_dataset: required"),
    ],
)
def test_broken_file_is_refused_in_one_line(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=expected) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"), [("digit", "'digits'"), ("missing.yaml", "does not exist"), (".", "folder")]
)
def test_recipe_that_is_not_there_is_refused(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_recipe(name)


def test_batch_size_is_checked_against_the_number_of_processes(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"train_batch_size: the global batch of 16 .* 3 processes.*=15"):
        make_plan(load_recipe(recipe))


def test_a_key_below_a_section_that_is_null_makes_the_section(recipe: str) -> None:
    loaded = load_recipe(recipe, ["algorithms=null", "algorithms.squeeze_excite.min_channels=64"])
    assert loaded.algorithms == {"squeeze_excite": {"min_channels": 64}}


def test_command_line_mapping_replaces_and_null_removes(recipe: str) -> None:
    loaded = load_recipe(recipe, ["optimizer={name: adamw, lr: 1e-3}", "algorithms={blurpool: {}, ema: null}"])
    assert loaded.optimizer == {"name": "adamw", "lr": 1e-3}
    assert [component.path for component in make_plan(loaded).algorithms] == ["algorithms.blurpool"]


def test_run_name_and_folders_follow_the_recipe(recipe: str) -> None:
    loaded = load_recipe(recipe)
    assert (loaded.run_name, loaded.run_folder, loaded.save_folder) == (
        "good",
        "runs/good",
        "runs/good/checkpoints",
    )
    assert loaded.eval_batch_size == 16
    assert load_recipe(recipe, ["run_name=x"]).save_folder == "runs/x/checkpoints"


def test_a_key_that_decides_the_weights_may_not_change() -> None:
    decides = {"model", "train_dataset", "optimizer", "scheduler", "algorithms", "seed", "train_batch_size"}
    for when_resumed in (True, False):
        assert not decides & set(free_to_change(when_resumed=when_resumed))
    assert "max_duration" in free_to_change(when_resumed=True)
    assert "max_duration" not in free_to_change(when_resumed=False)


@pytest.mark.parametrize("argument", ["root", "num_workers", "remote", "local", "cache_limit", "predownload"])
def test_where_and_how_images_are_read_may_change(argument: str) -> None:
    stored, now = ({"train_dataset": {argument: value}} for value in (1, 2))
    for when_resumed in (True, False):
        assert describe_changes(stored, now, free_to_change(when_resumed=when_resumed)) == ""
    stored, now = ({"train_dataset": {"image_size": value}} for value in (1, None))
    assert (
        describe_changes(stored, now, free_to_change(when_resumed=True)) == "train_dataset.image_size (was 1, now null)"
    )


def test_a_name_that_begins_like_the_users_word_is_the_nearest() -> None:
    assert did_you_mean("latent", ["placement", "latent_channels"]) == "; did you mean 'latent_channels'?"


def test_ctrl_c_before_a_command_has_begun_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    assert exit_code(interrupted, argparse.Namespace(), "composer-se plan") == 130
    assert capfd.readouterr().err == "\ncomposer-se plan: stopped\n"


def test_keys_for_the_trainer_are_its_own() -> None:
    from composer import Trainer

    parameters = inspect.signature(Trainer.__init__).parameters
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert set(keys("trainer")) <= set(parameters)
    assert set(keys("trainer")) <= fields


def test_small_images_are_trained_by_one_thread_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = dict.fromkeys(("OMP_WAIT_POLICY", "LOCAL_WORLD_SIZE"), "1") | {"OMP_NUM_THREADS": "3"}
    monkeypatch.setattr(launch.os, "environ", environment)
    monkeypatch.setattr(launch, "available_cores", lambda: 4)
    launch.share_cores()
    assert launch.threads_for(64 * 8**2) is None
    del environment["OMP_NUM_THREADS"]
    launch.share_cores()
    assert [launch.threads_for(pixels) for pixels in (64 * 8**2, 3 * 2**14, 8 * 224**2)] == [1, 3, 4]
    assert environment["OMP_NUM_THREADS"] == "4"
