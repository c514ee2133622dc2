"""What a recipe may say: its sections, its keys, their types and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

__all__ = ["COMPONENT_SECTIONS", "NAMED_SECTIONS", "TRAINER_KEYS", "Recipe"]

# Sections that hold one component, chosen by its `name`, beside the component's own arguments.
NAMED_SECTIONS = ("model", "train_dataset", "eval_dataset", "optimizer", "scheduler")

# Sections that hold any number of components: `snake_case name: {its arguments}`.
COMPONENT_SECTIONS = ("algorithms", "callbacks", "loggers")

# Keys handed to `composer.Trainer` under the same name and with the same meaning.
TRAINER_KEYS = (
    "run_name",
    "seed",
    "max_duration",
    "train_subset_num_batches",
    "eval_interval",
    "eval_subset_num_batches",
    "scale_schedule_ratio",
    "step_schedulers_every_batch",
    "device",
    "precision",
    "precision_config",
    "device_train_microbatch_size",
    "deterministic_mode",
    "dist_timeout",
    "ddp_sync_strategy",
    "parallelism_config",
    "compile_config",
    "save_folder",
    "save_interval",
    "save_num_checkpoints_to_keep",
    "load_path",
    "load_weights_only",
    "load_strict_model_weights",
    "load_ignore_keys",
    "load_exclude_algorithms",
    "progress_bar",
    "log_to_console",
    "console_log_interval",
    "python_log_level",
)


@dataclass
class Recipe:
    """One training run.

    The defaults are those of `composer.Trainer` unless a comment says otherwise. Durations and intervals are
    Composer's: `"90ep"` (epochs), `"1000ba"` (batches), a bare integer counts epochs.
    """

    # The parts of the run.
    model: dict[str, Any] = MISSING
    train_dataset: dict[str, Any] = MISSING
    eval_dataset: dict[str, Any] | None = None
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] | None = None
    algorithms: dict[str, Any] | None = field(default_factory=dict)
    callbacks: dict[str, Any] | None = field(default_factory=dict)
    loggers: dict[str, Any] | None = field(default_factory=dict)

    # The run. The name defaults to the recipe's own; everything the run leaves behind is in its folder.
    run_name: str = MISSING
    run_folder: str = "runs/${run_name}"
    seed: int = 17
    max_duration: int | str = MISSING

    # Batch sizes are global: each of W processes gets a W-th part.
    train_batch_size: int = MISSING
    eval_batch_size: int = "${train_batch_size}"  # type: ignore[assignment]
    train_subset_num_batches: int = -1

    # Evaluation, schedule.
    eval_interval: int | str = "1ep"
    eval_subset_num_batches: int = -1
    scale_schedule_ratio: float = 1.0
    step_schedulers_every_batch: bool | None = None

    # The machine.
    device: str | None = None
    precision: str | None = None
    precision_config: dict[str, Any] | None = None
    device_train_microbatch_size: int | float | str | None = None
    deterministic_mode: bool = False
    dist_timeout: float = 300.0
    ddp_sync_strategy: str | None = None
    parallelism_config: dict[str, Any] | None = None
    compile_config: dict[str, Any] | None = None

    # Checkpoints. The last two are kept: the newest, and the one before should the newest be damaged.
    save_folder: str = "${run_folder}/checkpoints"
    save_interval: int | str = "1ep"
    save_num_checkpoints_to_keep: int = 2
    load_path: str | None = None
    load_weights_only: bool = False
    load_strict_model_weights: bool = True
    load_ignore_keys: list[str] | None = None
    load_exclude_algorithms: list[str] | None = None

    # What the terminal shows.
    progress_bar: bool = True
    log_to_console: bool = False
    console_log_interval: int | str = "1ba"
    python_log_level: str | None = None
