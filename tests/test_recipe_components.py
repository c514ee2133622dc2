"""Every component of Composer works by name with its own arguments; ours stands in for Composer's SE."""

from __future__ import annotations

import inspect
from typing import Any

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import pytest
import torch
from composer.core import Algorithm, Callback, Event
from composer.loggers import LoggerDestination

import composer_se
from composer_se.errors import UserError
from composer_se.parts.arguments import check_arguments, construct
from composer_se.parts.components import components, resolve

BASES = {
    "algorithms": ([composer.algorithms], Algorithm),
    "callbacks": ([composer.callbacks], Callback),
    "loggers": ([composer.loggers], LoggerDestination),
    "optimizer": ([composer.optim, torch.optim], torch.optim.Optimizer),
    "scheduler": ([composer.optim], composer.optim.ComposerScheduler),
}


def public_classes(section: str) -> list[type]:
    modules, base = BASES[section]
    names = [(module, name) for module in modules for name in getattr(module, "__all__", dir(module))]
    classes = [getattr(module, name, None) for module, name in names]
    return [cls for cls in classes if inspect.isclass(cls) and issubclass(cls, base) and cls is not base]


def arguments_of(cls: type) -> dict[str, Any]:
    """A value for every argument of the constructor: its default, or one for its name."""
    required = {
        "max_sequence_length": 8,
        "clipping_type": "norm",
        "clipping_threshold": 1.0,
        "target_layer_name": "ResNetBottleneck",
        "lr": 0.1,
        "t_warmup": "1ep",
        "t_0": "1ep",
        "milestones": ["1ep", "2ep"],
        "gamma": 0.1,
        "power": 2,
        "step_size": "1ep",
        "threshold": 0.5,
        "index": 1,
        "prompts": ["x"],
        "interval": "1ba",
    }
    if "__init__" not in vars(cls) and issubclass(cls, Callback):
        return {}
    values = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name == "params" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if isinstance(parameter.default, (bool, int, float, str, list, type(None))):
            values[name] = parameter.default
        elif isinstance(parameter.default, tuple):
            values[name] = list(parameter.default)
        elif parameter.default is parameter.empty or "required" in repr(parameter.default):
            values[name] = required.get(name, "x")
    return values


@pytest.mark.parametrize("section", BASES)
def test_every_public_class_works_by_name_with_its_own_arguments(section: str) -> None:
    by_class = {cls: name for name, cls in components(section).items()}
    for cls in public_classes(section):
        if cls is composer.algorithms.SqueezeExcite:
            continue
        assert resolve(section, by_class[cls], section) is cls
        given = arguments_of(cls)
        checked = check_arguments(cls, given, section, supplied=("params",))
        assert checked.keys() == given.keys()
        if cls.__name__ not in ("Generate", "NeptuneLogger"):  # these two hand any argument on
            with pytest.raises(UserError, match=rf"{section}\.no_such_argument"):
                check_arguments(cls, given | {"no_such_argument": 1}, section, supplied=("params",))


def test_names_are_composers_own_spelling() -> None:
    assert {"blurpool", "mixup", "randaugment", "ghost_batchnorm", "ema", "swa"} <= components("algorithms").keys()
    assert {"lr_monitor", "mlperf", "oom_observer", "early_stopper"} <= components("callbacks").keys()
    assert {"wandb_logger", "tensorboard_logger", "in_memory_logger"} <= components("loggers").keys()
    assert {"decoupled_sgdw", "decoupled_adamw", "sgd", "adamw", "sparse_adam"} <= components("optimizer").keys()
    assert {"cosine_annealing_with_warmup", "multi_step", "constant"} <= components("scheduler").keys()


@pytest.mark.parametrize(
    ("section", "name", "canonical"),
    [
        ("algorithms", "mix_up", "mixup"),
        ("algorithms", "ghost_batch_norm", "ghost_batchnorm"),
        ("loggers", "wandb", "wandb_logger"),
        ("callbacks", "early_stopper", "early_stopper"),
        ("callbacks", "mlperf_callback", "mlperf"),
        ("scheduler", "cosine_annealing_scheduler", "cosine_annealing"),
    ],
)
def test_other_spellings_of_a_name_work(section: str, name: str, canonical: str) -> None:
    assert resolve(section, name, section) is components(section)[canonical]


def test_squeeze_excite_is_ours_and_composers_has_a_name_of_its_own() -> None:
    assert resolve("algorithms", "squeeze_excite", "algorithms") is composer_se.SqueezeExcite
    theirs = resolve("algorithms", "composer_squeeze_excite", "algorithms")
    assert theirs.__module__ == "composer.algorithms.squeeze_excite.squeeze_excite"


def takes(
    number: float, whole: int = 1, text: str = "", pair: tuple[float, float] = (0, 0), maybe: int | str | None = None
) -> dict[str, Any]:
    return {"number": number, "whole": whole, "text": text, "pair": pair, "maybe": maybe}


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("number", "1e-4", 1e-4),
        ("number", 64, 64),
        ("whole", "3", 3),
        ("whole", 3.0, 3),
        ("text", 2024, "2024"),
        ("pair", [0.9, "0.99"], (0.9, 0.99)),
        ("maybe", "auto", "auto"),
        ("maybe", 3, 3),
        ("maybe", None, None),
    ],
)
def test_values_are_converted_to_the_annotated_type(name: str, given: Any, expected: Any) -> None:
    checked = check_arguments(takes, {"number": 1.0} | {name: given}, "section")[name]
    assert checked == expected
    assert type(checked) is type(expected)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("number", True),
        ("number", "fast"),
        ("number", None),
        ("whole", 3.5),
        ("whole", True),
        ("text", ["a"]),
        ("pair", [1]),
        ("pair", 1),
        ("maybe", 3.5),
        ("maybe", True),
    ],
)
def test_values_of_another_type_are_refused(name: str, given: Any) -> None:
    with pytest.raises(UserError, match=rf"section\.{name}: expected"):
        check_arguments(takes, {"number": 1.0} | {name: given}, "section")


def test_enumerations_and_interval_strings_reach_composer() -> None:
    cls = resolve("algorithms", "low_precision_layernorm", "algorithms")
    assert check_arguments(cls, {"apply_at": "init"}, "algorithms")["apply_at"] is Event.INIT
    scheduler = resolve("scheduler", "multi_step", "scheduler")
    assert check_arguments(scheduler, {"milestones": ["1ep", 2]}, "scheduler")["milestones"] == ["1ep", "2"]


def test_a_value_the_constructor_rejects_names_its_path() -> None:
    ema = resolve("algorithms", "ema", "algorithms")
    with pytest.raises(UserError, match=r"algorithms\.ema: .*(half_life|smoothing)"):
        construct(ema, "algorithms.ema", half_life="1ba", smoothing=0.5)
