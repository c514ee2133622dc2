"""The keys of a recipe: type, default, meaning, and facts that other modules use."""

# ruff: noqa: RUF009 - `_key` makes a new field at each call.

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

__all__ = ["COMPONENT_SECTIONS", "NAMED_SECTIONS", "READING", "Recipe", "free_to_change", "keys"]

# Sections that hold one component: its `name` and its arguments.
NAMED_SECTIONS = ("model", "train_dataset", "eval_dataset", "optimizer", "scheduler")

# Sections that hold any number of components: `snake_case name: {its arguments}`.
COMPONENT_SECTIONS = ("algorithms", "callbacks", "loggers")

# Arguments of a data set that change where and how fast images are read, but not the images.
READING = ("num_workers", "root", "remote", "local", "cache_limit", "predownload")

# Facts about keys. A key with neither `resume` nor `free` changes the trained weights.
_FACTS = {
    "trainer",  # goes to `composer.Trainer` under its name
    "speed",  # the time of a training step depends on it
    "resume",  # a run that continues may change it: its steps so far would have been the same
    "free",  # neither weights nor accuracy depend on the key
    "same",  # all arms of a comparison must have it in common
    "set",  # a comparison sets it itself
}


def _key(default: Any, meaning: str, facts: str = "") -> Any:
    """One key of a recipe, with its meaning for the reference page and words of `_FACTS`."""
    metadata = {"meaning": meaning, "facts": frozenset(facts.split())}
    assert metadata["facts"] <= _FACTS
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Recipe:
    """One training run.

    Durations and intervals are written as for `composer.Trainer`: `"90ep"` (epochs), `"1000ba"` (batches); an integer
    counts epochs.
    """

    # The parts of the run.
    model: dict[str, Any] = _key(MISSING, "the network: `name` and its arguments", "speed")
    train_dataset: dict[str, Any] = _key(MISSING, "the training data: `name`, its arguments, `num_workers`", "speed")
    eval_dataset: dict[str, Any] | None = _key(None, "the held-out data, likewise; null for none", "resume same")
    optimizer: dict[str, Any] = _key(MISSING, "the optimizer: `name` and its arguments", "speed")
    scheduler: dict[str, Any] | None = _key(None, "the learning rate's schedule: `name` and its arguments", "speed")
    algorithms: dict[str, Any] | None = _key({}, "Composer's algorithms and our SE, by name with arguments", "speed")
    trainable: list[str] | None = _key(
        None, "patterns of the parameters that train, or the words `se`, `norms`, `head`; null: all train", "speed"
    )
    callbacks: dict[str, Any] | None = _key({}, "Composer's callbacks and our `gate_monitor`, likewise", "free")
    loggers: dict[str, Any] | None = _key({}, "Composer's loggers; `metrics.jsonl` needs none", "free")

    # The run. By default it has the name of the recipe's file and writes everything into its folder.
    run_name: str = _key(MISSING, "the run's name; the recipe's own if it isn't given", "trainer set")
    run_folder: str = _key("runs/${run_name}", "where everything goes", "free set")
    seed: int = _key(17, "of initial weights, shuffling and augmentation", "trainer set")
    max_duration: int | str = _key(MISSING, "how long to train: `90ep`, `100ba`, `1000sp`", "trainer speed resume same")

    # Batch sizes are global: each of W processes gets a W-th part.
    train_batch_size: int = _key(MISSING, "images per training step, over all processes", "speed")
    eval_batch_size: int = _key("${train_batch_size}", "images per evaluation step, over all processes", "resume")
    train_subset_num_batches: int = _key(-1, "training steps of an epoch; -1 for all", "trainer speed same")

    # Evaluation, schedule.
    eval_interval: int | str = _key("1ep", "how often to evaluate; 0 for never", "trainer resume")
    eval_subset_num_batches: int = _key(-1, "steps of an evaluation; -1 for all", "trainer resume same")
    scale_schedule_ratio: float = _key(1.0, "stretches schedule and duration by a factor", "trainer speed same")
    step_schedulers_every_batch: bool | None = _key(None, "false: the schedule moves once per epoch", "trainer speed")

    # The machine.
    device: str | None = _key(None, "`cpu`, `gpu`, `mps` or `tpu`; null: the GPU if any", "trainer speed resume")
    precision: str | None = _key(None, "`fp32`, `amp_bf16`, `amp_fp16`, …; null: Composer's choice", "trainer speed")
    precision_config: dict[str, Any] | None = _key(None, "settings of 8-bit precision", "trainer speed")
    device_train_microbatch_size: int | float | str | None = _key(
        None,
        "images that a device takes at once; null: its share of the batch; `auto` on a GPU",
        "trainer speed resume",
    )
    deterministic_mode: bool = _key(False, "only operators with reproducible results", "trainer speed")
    dist_timeout: float = _key(300.0, "seconds to wait for another process", "trainer free")
    ddp_sync_strategy: str | None = _key(None, "when processes exchange gradients", "trainer speed resume")
    parallelism_config: dict[str, Any] | None = _key(None, "FSDP and tensor parallelism", "trainer speed")
    compile_config: dict[str, Any] | None = _key(
        None, "`torch.compile`'s arguments; null: none", "trainer speed resume"
    )

    # Checkpoints. The last two are kept by default, in case the newest is damaged.
    save_folder: str = _key("${run_folder}/checkpoints", "where checkpoints go", "trainer free set")
    save_interval: int | str = _key("1ep", "how often to save a checkpoint", "trainer free")
    save_num_checkpoints_to_keep: int = _key(2, "older checkpoints are deleted; -1 keeps all", "trainer free")
    load_path: str | None = _key(
        None, "a checkpoint or a file of weights to start from, loaded once the network has SE", "trainer"
    )
    load_weights_only: bool = _key(False, "of a checkpoint, load the weights alone", "trainer resume")
    load_strict_model_weights: bool = _key(True, "refuse weights that are missing or left over", "trainer resume")
    load_ignore_keys: list[str] | None = _key(None, "patterns of names in `load_path` to leave out", "trainer resume")
    load_exclude_algorithms: list[str] | None = _key(None, "the checkpoint's algorithms not to add", "trainer resume")

    # Output on the terminal.
    progress_bar: bool = _key(True, "show a progress bar", "trainer free")
    log_to_console: bool = _key(False, "print metrics", "trainer free")
    console_log_interval: int | str = _key("1ba", "how often to print them", "trainer free")
    python_log_level: str | None = _key(None, "the level of Composer's own log", "trainer free")


def keys(*facts: str) -> tuple[str, ...]:
    """The keys to which all the given `_FACTS` apply. Without facts, all keys."""
    assert _FACTS.issuperset(facts)
    return tuple(key.name for key in dataclasses.fields(Recipe) if key.metadata["facts"].issuperset(facts))


def free_to_change(*, when_resumed: bool) -> tuple[str, ...]:
    """The dotted keys, with all keys below them, in which a recipe may differ from that of a stored run.

    Args:
        when_resumed: True for a run that continues, False for a complete one, whose result is fixed.
    """
    reading = tuple(f"{section}.{argument}" for section in ("train_dataset", "eval_dataset") for argument in READING)
    return (*keys("free"), *(keys("resume") if when_resumed else ()), *reading)
