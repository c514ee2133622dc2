"""Squeeze-and-Excitation as an algorithm of the Composer Trainer."""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import composer.algorithms
import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import nn

from composer_se import surgery
from composer_se.functional import apply_squeeze_excite
from composer_se.options import SqueezeExciteOptions
from composer_se.wrapper import SqueezeExcited

__all__ = ["SqueezeExcite"]

log = logging.getLogger(__name__)


class SqueezeExcite(Algorithm):
    """Adds Squeeze-and-Excitation blocks (Hu et al., https://arxiv.org/abs/1709.01507) to convs of the Trainer's model.

    Runs on `Event.INIT`, before the model is wrapped for distributed training, and adds the new parameters to the
    Trainer's optimizer. All ranks start from the same initial weights. See `composer_se.apply_squeeze_excite` for the
    rules and for use without the Trainer.

    This algorithm can continue a checkpoint of Composer's own SqueezeExcite. Give the Trainer
    ``load_exclude_algorithms=["SqueezeExcite"]``, as recipes do. Otherwise Composer warns, adds its own algorithm, and
    adds blocks to the convs that this algorithm leaves out.

    Args:
        latent_channels: As in `composer_se.SqueezeExciteOptions`, like all options. Default: ``64``.
        min_channels: The least number of channels of a conv that gets a block, or ``"auto"``. Default: ``128``.
        min_channels_of: ``"output"`` or ``"both"``. Default: ``"output"``.
        include: Glob pattern, or several, of convs that get a block. Default: all.
        exclude: Glob pattern, or several, of convs to skip. Default: none.
        init: ``"default"``, or ``"identity"`` for networks that are trained already. Default: ``"default"``.
        placement: ``"conv"``, or ``"norm"`` for blocks after the norm that follows. Default: ``"conv"``.
        inplace: An option of earlier versions without effect.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> trainer = Trainer(model=model, algorithms=[composer_se.SqueezeExcite(latent_channels=64, min_channels=512)])
    """

    def __init__(
        self,
        latent_channels: float = SqueezeExciteOptions.latent_channels,
        min_channels: int | str = SqueezeExciteOptions.min_channels,
        *,
        min_channels_of: str = SqueezeExciteOptions.min_channels_of,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        init: str = SqueezeExciteOptions.init,
        placement: str = SqueezeExciteOptions.placement,
        inplace: object = None,
    ) -> None:
        self.options = SqueezeExciteOptions(
            latent_channels=latent_channels,
            min_channels=min_channels,
            min_channels_of=min_channels_of,
            include=include,
            exclude=exclude,
            init=init,
            placement=placement,
            inplace=inplace,
        )

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in asdict(self.options).items())
        return f"{type(self).__qualname__}({options})"

    @staticmethod
    def required_on_load() -> bool:
        """True: a checkpoint of a model with SE loads only into a model with SE."""
        return True

    def match(self, event: Event, state: State) -> bool:
        """True for `Event.INIT`."""
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Changes the model and its optimizers, logs one line and records the hyperparameters."""
        model = state.model
        num_convs = surgery.count_module_instances(model, nn.Conv2d)
        with _rank_zero_rng(state):
            added = apply_squeeze_excite(model, optimizers=state.optimizers or None, **asdict(self.options))
        num_layers = surgery.count_module_instances(model, SqueezeExcited)
        num_parameters = sum(parameter.numel() for wrapper in added.values() for parameter in wrapper.se.parameters())
        log.info(
            "SE on %d of %d convs, %d parameters added (%s).",
            num_layers,
            num_convs,
            num_parameters,
            ", ".join(f"{name}={value}" for name, value in asdict(self.options).items() if value is not None),
        )
        logger.log_hyperparameters(
            {
                "squeeze_excite/num_squeeze_excite_layers": num_layers,
                "squeeze_excite/num_added_parameters": num_parameters,
            }
        )


@contextlib.contextmanager
def _rank_zero_rng(state: State) -> Iterator[None]:
    """Draws the same initial weights on all ranks, and leaves the generators as they were.

    Composer gives every rank a seed of its own, and FSDP may shard without a broadcast from rank zero.
    """
    devices = {parameter.device for parameter in state.model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed, which seeds the devices that were not forked too.
        for generator in (torch.default_generator, *(torch.cuda.default_generators[d.index] for d in devices)):
            generator.manual_seed(state.rank_zero_seed)
        yield


# A checkpoint stores an algorithm under its qualified name, with its repr. On load, Composer looks for a class of that
# name in composer.algorithms. If the class is required on load, Composer evaluates "composer.algorithms." + repr. Under
# the name "SqueezeExcite" it would find its own class and add that on top of ours. Under this name it finds ours.
SqueezeExcite.__qualname__ = "composer_se.SqueezeExcite"
composer_se = types.SimpleNamespace(SqueezeExcite=SqueezeExcite)  # where pickle looks for that name
composer.algorithms.composer_se = composer_se  # pyright: ignore[reportAttributeAccessIssue]
setattr(composer.algorithms, SqueezeExcite.__qualname__, SqueezeExcite)
