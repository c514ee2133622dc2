"""Trains a recipe and writes its summary."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composer import Callback, Trainer
from composer.utils import dist

from composer_se.errors import UserError, one_line
from composer_se.launch import say
from composer_se.parts.weights import LoadedWeights, read_plain_weights
from composer_se.recipe.checkpoints import (
    chain,
    check_latest,
    explain_failed_write,
    remove_unfinished_checkpoint,
    restore_latest,
)
from composer_se.recipe.distributed import SameBuffers, from_rank_zero, join_processes
from composer_se.recipe.metrics import MetricsFile
from composer_se.recipe.run_folder import (
    check_classes,
    check_unchanged,
    is_under_way,
    read_finished,
    write_classes,
    write_recipe,
    write_summary,
)
from composer_se.recipe.schema import Recipe, keys
from composer_se.recipe.trainer import build_parts, end_trainer, make_trainer
from composer_se.recipe.validate import RunPlan, advise_identity, make_plan, squeeze_excite_options

__all__ = ["exit_code_of", "train"]

# The summary holds the metrics whose names start like this.
_FINAL_METRICS = ("metrics/eval/", "loss/train/total", "throughput/samples_per_sec")

# Exit codes after SIGINT and SIGTERM, as shells report them. Composer's handler uses the same codes.
_INTERRUPTED = (130, 143)


def train(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> tuple[dict[str, Any], bool]:
    """Trains a run to its end, from its last checkpoint if it has one. Does not train a complete run again.

    Args:
        recipe: The run.
        callbacks: Further callbacks, besides the recipe's. They must not change the training.

    Returns:
        The content of `summary.json`, and True if the run was complete before.

    Raises:
        UserError: If the recipe is wrong, the run folder belongs to another recipe, its latest checkpoint is damaged,
            or a file can't be written. The next call continues the run.
    """
    started = time.monotonic()
    plan = make_plan(recipe)
    join_processes(recipe)
    finished = from_rank_zero(lambda: _look_at_run_folder(recipe))
    if finished:
        return finished, True
    trainer, metrics = _build(recipe, plan, callbacks)
    if not _is_trained(trainer):
        trainer.fit()
    elif trainer.state.evaluators:
        trainer.eval()  # the run was stopped in its last evaluation
    summary = _summarise(recipe, trainer, metrics, time.monotonic() - started)
    end_trainer(trainer)
    if dist.get_global_rank() == 0:
        write_summary(recipe, summary)
    return summary, False


def exit_code_of(work: Callable[[], object], folder: Path) -> int:
    """Calls a function that trains, and returns an exit code.

    Args:
        work: The function, called without arguments.
        folder: The folder that the function writes to, for the error message.

    Returns:
        0 when `work` has returned, 130 after SIGINT, 143 after SIGTERM.

    Raises:
        UserError: If a file could not be written.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        work()
    except (OSError, RuntimeError, KeyboardInterrupt, SystemExit) as error:
        code = _interruption_behind(error)
        if code is not None:
            remove_unfinished_checkpoint(error)
            return code
        complaint = None if isinstance(error, SystemExit) else explain_failed_write(error, folder)
        if complaint is None:
            raise
        raise complaint from error
    return 0


def _stop(number: int, frame: object) -> None:
    """Exits at the first signal, like Composer's handler, which it replaces. Then it ignores SIGTERM.

    At Ctrl-C the launcher also sends SIGTERM to all processes, which would interrupt the exit and the message to the
    user. A second Ctrl-C still ends the process.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)
    sys.exit(128 + number)


def _look_at_run_folder(recipe: Recipe) -> dict[str, Any] | None:
    """Returns the summary of the run if it is complete already. Call it on rank zero only.

    Raises:
        UserError: If the folder holds the run of another recipe, or the latest checkpoint is damaged.
    """
    checkpoints = None if "://" in recipe.save_folder else Path(recipe.save_folder)
    if checkpoints:
        restore_latest(checkpoints)
    check_unchanged(recipe)
    finished = read_finished(recipe)
    if checkpoints and not finished:
        check_latest(checkpoints)
    return finished


def _build(recipe: Recipe, plan: RunPlan, callbacks: Sequence[Callback]) -> tuple[Trainer, MetricsFile]:
    own_callbacks = [component.build() for component in plan.callbacks]
    loggers = [component.build() for component in plan.loggers]
    weights = read_plain_weights(recipe.load_path)
    parts = build_parts(recipe, plan)
    from_rank_zero(lambda: check_classes(recipe, parts.classes))

    metrics = MetricsFile(Path(recipe.run_folder) / "metrics.jsonl")
    options = {key: getattr(recipe, key) for key in keys("trainer")}
    if parts.eval_loader is None:
        options["eval_interval"] = 1  # the Trainer warns about any other interval when there is nothing to evaluate
    if squeeze_excite_options(recipe) is not None:  # our blocks replace those of Composer's built-in
        options["load_exclude_algorithms"] = [*(recipe.load_exclude_algorithms or ()), "SqueezeExcite"]
    advise_identity(plan, weights)
    if weights is not None:
        strict, ignored = recipe.load_strict_model_weights, recipe.load_ignore_keys or ()
        parts.algorithms.append(LoadedWeights(weights, str(recipe.load_path), strict, ignored))
        options["load_path"] = None
    # Rank zero looks: the folder may be on rank zero's node alone.
    starts_elsewhere = recipe.load_path is not None and from_rank_zero(lambda: not is_under_way(recipe))
    run_folder = Path(recipe.run_folder)
    new_folders = [folder for folder in (run_folder, *run_folder.parents) if not folder.exists()]
    try:
        trainer = make_trainer(
            parts,
            eval_dataloader=parts.eval_loader,
            callbacks=[*own_callbacks, *callbacks, SameBuffers()],
            loggers=[*loggers, metrics],
            autoresume=True,
            save_overwrite=True,  # else an unfinished checkpoint would stop the run
            **options,
        )
        if starts_elsewhere:
            _say_where_load_path_begins(recipe, trainer)
    except (UserError, RuntimeError) as error:
        misfit = recipe.load_path and "loading state_dict" in str(error)  # a checkpoint of another network
        if dist.get_global_rank() == 0 and (misfit or isinstance(error, UserError)):
            _remove(new_folders)
        if misfit and not isinstance(error, UserError):
            raise UserError(
                f"load_path: {recipe.load_path}: {one_line(error)[:300]} …; load_strict_model_weights=false loads what "
                "fits, load_ignore_keys=[...] leaves weights out"
            ) from error
        raise
    if not starts_elsewhere and int(trainer.state.timestamp.batch):
        say(f"continuing {recipe.run_folder} from its checkpoint of {_position(trainer)}")
    if dist.get_global_rank() == 0:
        write_recipe(recipe)
        write_classes(recipe, parts.classes)
    return trainer, metrics


def _say_where_load_path_begins(recipe: Recipe, trainer: Trainer) -> None:
    """Prints the epoch and batch of the checkpoint that a run starts from.

    Raises:
        UserError: If the checkpoint is at or after the end of the run.
    """
    if _is_trained(trainer):
        raise UserError(
            f"load_path: {recipe.load_path}: is a checkpoint of {_position(trainer)}, where max_duration="
            f"{recipe.max_duration} ends; take its weights alone with load_weights_only=true, or raise max_duration"
        )
    if int(trainer.state.timestamp.batch):
        say(f"starting {recipe.run_folder} from {recipe.load_path}, a checkpoint of {_position(trainer)}")


def _position(trainer: Trainer) -> str:
    return f"epoch {int(trainer.state.timestamp.epoch)}, batch {int(trainer.state.timestamp.batch)}"


def _remove(new_folders: list[Path]) -> None:
    """Removes the run folder, and those of the new folders above it that are empty.

    Args:
        new_folders: The folders that this run created: the run folder, then its parents upwards.
    """
    if not new_folders:
        return
    run_folder, *parents = new_folders
    shutil.rmtree(run_folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty
        for parent in parents:
            parent.rmdir()


def _is_trained(trainer: Trainer) -> bool:
    """True when the checkpoint has no training step left."""
    end = trainer.state.max_duration
    return end is not None and trainer.state.timestamp.get(end.unit) >= end


def _summarise(recipe: Recipe, trainer: Trainer, metrics: MetricsFile, seconds: float) -> dict[str, Any]:
    state = trainer.state
    layers = metrics.hyperparameters.get("squeeze_excite/num_squeeze_excite_layers", 0)
    parameters = list(state.model.parameters())
    added = metrics.hyperparameters.get("squeeze_excite/num_added_parameters", 0)
    return {
        "run_name": recipe.run_name,
        "run_folder": recipe.run_folder,
        "max_duration": recipe.max_duration,
        "epoch": int(state.timestamp.epoch),
        "batch": int(state.timestamp.batch),
        "sample": int(state.timestamp.sample),
        "metrics": {name: number for name, number in metrics.latest.items() if name.startswith(_FINAL_METRICS)},
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "squeeze_excite_layers": layers,
        "squeeze_excite_parameters": added,
        "wall_seconds": round(seconds, 2),
    }


def _interruption_behind(error: BaseException) -> int | None:
    """The exit code of the signal that caused an error, or None. A signal can make a write raise another error."""
    for link in chain(error):
        if isinstance(link, KeyboardInterrupt):
            return 130
        if isinstance(link, SystemExit) and link.code in _INTERRUPTED:  # from `_stop`, or from Composer's handler
            return int(link.code)
    return None
