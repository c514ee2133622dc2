"""One training run, from the name of a recipe to the table at its end."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_se.errors import UserError
from composer_se.recipe import ranks
from composer_se.recipe.interruption import exit_code_of
from composer_se.recipe.load import load_recipe

if TYPE_CHECKING:
    from composer import Callback, Trainer

    from composer_se.recipe.metrics_file import MetricsFile
    from composer_se.recipe.run_plan import RunPlan
    from composer_se.recipe.schema import Recipe

__all__ = ["log_on_terminal", "run_recipe", "train"]

# Of all that is logged, what the summary tells.
_FINAL_METRICS = ("metrics/eval/", "loss/train/total", "throughput/samples_per_sec")


def run_recipe(recipe: str, overrides: Sequence[str] = ()) -> int:
    """Trains a recipe, in this process and its siblings under the launcher.

    A run that was killed continues from its last checkpoint. A run that is complete is left alone: its summary is
    shown again.

    Args:
        recipe: The path of a YAML file, or the name of a shipped recipe.
        overrides: `dotted.key=value` strings.

    Returns:
        The exit code: 0 when the run is complete (now or already before), 130 or 143 when it was interrupted.

    Raises:
        UserError: The recipe is wrong, the run folder belongs to another recipe, or its latest checkpoint is
            damaged: nothing was written. Or the run could not write a file: it continues when there is room.
    """
    loaded = load_recipe(recipe, overrides)
    ranks.share_cores()
    with log_on_terminal():
        code = exit_code_of(lambda: _train_and_show(loaded), Path(loaded.run_folder))
    if code:
        ranks.say(f"\ncomposer-se: {loaded.run_name}: stopped; the same command continues from the last checkpoint")
    return code


def _train_and_show(recipe: Recipe) -> None:
    from composer_se.recipe.summary_table import print_summary

    summary, was_finished = train(recipe)
    if ranks.is_local_rank_zero() if was_finished else _is_global_rank_zero():
        print_summary(summary)
    if was_finished:
        ranks.say(
            f"{recipe.run_folder} is complete: nothing to train. Train longer with max_duration=..., "
            "or start anew under another name with run_name=..."
        )


def train(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> tuple[dict[str, Any], bool]:
    """Trains a run to its end, from its last checkpoint if there is one, unless it is complete already.

    Args:
        recipe: The run.
        callbacks: Callbacks of the caller's, beside those of the recipe. They must not touch what is trained.

    Returns:
        The run's summary, as `summary.json` holds it, and whether the run was complete before.

    Raises:
        UserError: As `run_recipe`.
    """
    from composer_se.recipe.end_trainer import end_trainer
    from composer_se.recipe.run_plan import make_plan

    started = time.monotonic()
    plan = make_plan(recipe)
    finished = _agree_on_run_folder(recipe)
    if finished:
        return finished, True
    trainer, metrics = _build(recipe, plan, callbacks)
    _show_start(recipe, trainer)
    if not _is_trained(trainer):
        trainer.fit()
    elif trainer.state.evaluators:
        trainer.eval()  # which was interrupted
    summary = _summarise(recipe, trainer, metrics, time.monotonic() - started)
    end_trainer(trainer)
    if _is_global_rank_zero():
        from composer_se.recipe.run_folder import write_summary

        write_summary(recipe, summary)
        _write_report(recipe)
    return summary, False


@contextlib.contextmanager
def log_on_terminal() -> Iterator[None]:
    """Shows our own log on the process the user watches, and hides warnings about what isn't the user's doing."""
    log = logging.getLogger("composer_se")
    level, propagate = log.level, log.propagate
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.INFO if ranks.is_local_rank_zero() else logging.WARNING)
    # Composer says this of every evaluation set whose last batch is not full.
    warnings.filterwarnings("ignore", message="Cannot split tensor of length")
    # And this of label smoothing, whose targets add up to one but for rounding.
    warnings.filterwarnings("ignore", message="Some targets have less than 1 total probability")
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


def _agree_on_run_folder(recipe: Recipe) -> dict[str, Any] | None:
    """Whether there is something to train: the summary of the run if it is complete already.

    Raises:
        UserError: On all ranks: the folder holds another recipe's run, or a latest checkpoint that is damaged.
    """
    from composer_se.recipe.agreement import from_rank_zero, join_processes
    from composer_se.recipe.checkpoints import check_latest, local_folder, restore_latest
    from composer_se.recipe.run_folder import check_unchanged, read_finished

    def look() -> dict[str, Any] | None:
        checkpoints = local_folder(recipe.save_folder)
        if checkpoints:
            restore_latest(checkpoints)
        check_unchanged(recipe)
        finished = read_finished(recipe)
        if checkpoints and not finished:
            check_latest(checkpoints)
        return finished

    join_processes(recipe)
    return from_rank_zero(look)


def _build(recipe: Recipe, plan: RunPlan, callbacks: Sequence[Callback]) -> tuple[Trainer, MetricsFile]:
    from composer import Trainer
    from composer.models import ComposerClassifier

    from composer_se.recipe.build import algorithm_named, build_parts, num_classes
    from composer_se.recipe.metrics_file import MetricsFile
    from composer_se.recipe.run_folder import metrics_file, write_recipe
    from composer_se.recipe.same_buffers import SameBuffers
    from composer_se.recipe.schema import TRAINER_KEYS

    algorithms = [component.build() for component in plan.algorithms]
    own_callbacks = [component.build() for component in plan.callbacks]
    loggers = [component.build() for component in plan.loggers]
    scheduler = plan.scheduler.build() if plan.scheduler else None
    parts = build_parts(recipe, plan)

    metrics = MetricsFile(metrics_file(recipe))
    options = {key: getattr(recipe, key) for key in TRAINER_KEYS}
    if parts.eval_loader is None:
        options["eval_interval"] = 1  # the Trainer warns of any other interval when there is nothing to evaluate
    run_folder = Path(recipe.run_folder)
    new_folders = [folder for folder in (run_folder, *run_folder.parents) if not folder.exists()]
    try:
        with algorithm_named(algorithms, plan):
            trainer = Trainer(
                model=ComposerClassifier(parts.network, num_classes=num_classes(parts.network, plan)),
                train_dataloader=parts.train_loader,
                eval_dataloader=parts.eval_loader,
                optimizers=parts.optimizer,
                schedulers=scheduler,
                algorithms=algorithms,
                callbacks=[*own_callbacks, *callbacks, SameBuffers()],
                loggers=[*loggers, metrics],
                autoresume=True,
                save_overwrite=True,  # a checkpoint cut short by a kill must not be in the way of its successor
                **options,
            )
    except UserError:
        if _is_global_rank_zero():
            _remove(new_folders)
        raise
    if _is_global_rank_zero():
        write_recipe(recipe)
    return trainer, metrics


def _remove(new_folders: list[Path]) -> None:
    """Removes the run folder, and the folders above it as long as no other run has put anything there meanwhile.

    Args:
        new_folders: The run folder and those above it, upwards, that did not exist before this run.
    """
    if not new_folders:
        return
    run_folder, *parents = new_folders
    shutil.rmtree(run_folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty
        for parent in parents:
            parent.rmdir()


def _show_start(recipe: Recipe, trainer: Trainer) -> None:
    timestamp = trainer.state.timestamp
    if int(timestamp.batch):
        ranks.say(
            f"continuing {recipe.run_folder} from its checkpoint of epoch {int(timestamp.epoch)}, "
            f"batch {int(timestamp.batch)}"
        )


def _is_trained(trainer: Trainer) -> bool:
    """Whether the checkpoint is that of the last step: the run was stopped in its last evaluation."""
    end = trainer.state.max_duration
    return end is not None and trainer.state.timestamp.get(end.unit) >= end


def _summarise(recipe: Recipe, trainer: Trainer, metrics: MetricsFile, seconds: float) -> dict[str, Any]:
    state = trainer.state
    layers = metrics.hyperparameters.get("squeeze_excite/num_squeeze_excite_layers", 0)
    added = metrics.hyperparameters.get("squeeze_excite/num_added_parameters", 0)
    return {
        "run_name": recipe.run_name,
        "run_folder": recipe.run_folder,
        "max_duration": recipe.max_duration,
        "epoch": int(state.timestamp.epoch),
        "batch": int(state.timestamp.batch),
        "sample": int(state.timestamp.sample),
        "metrics": {name: number for name, number in metrics.latest.items() if name.startswith(_FINAL_METRICS)},
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "squeeze_excite_layers": layers,
        "squeeze_excite_parameters": added,
        "wall_seconds": round(seconds, 2),
    }


def _write_report(recipe: Recipe) -> None:
    from composer_se.report import write_report

    try:
        write_report(Path(recipe.run_folder))
    except Exception:
        # A run that trained to its end must not look like one that failed.
        logging.getLogger(__name__).warning("%s: report.html could not be written", recipe.run_folder, exc_info=True)


def _is_global_rank_zero() -> bool:
    from composer.utils import dist

    return dist.get_global_rank() == 0
