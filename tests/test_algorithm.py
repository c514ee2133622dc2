"""The algorithm in real Trainers, and the four things that checkpoints ask of it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import conv_norm_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("composer")

import composer.algorithms
from composer import Trainer
from composer.core import Event
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier

import composer_se
import composer_se.functional as cf
from composer_se import SqueezeExcite, SqueezeExciteConv2d, surgery

OPTIONS: dict[str, Any] = {"latent_channels": 4, "min_channels": 16, "min_channels_of": "both"}
BUILTIN = composer.algorithms.SqueezeExcite


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(16) % 4), batch_size=4)


def trainer(algorithms: list[Any], **options: Any) -> Trainer:
    torch.manual_seed(7)
    model = ComposerClassifier(conv_norm_net((16, 16, 32)), num_classes=4)
    settings: dict[str, Any] = {
        "optimizers": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "train_dataloader": loader(),
        "max_duration": "2ep",
        "algorithms": algorithms,
        "progress_bar": False,
        "seed": 17,
        "save_filename": "ep{epoch}.pt",
        "save_latest_filename": None,
        **options,
    }
    return Trainer(model=model, **settings)


def network_weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.state.model.state_dict().items() if "metric" not in name}


def num_layers(run: Trainer, kind: type[nn.Module] = SqueezeExciteConv2d) -> int:
    return surgery.count_module_instances(run.state.model, kind)


def assert_equal_weights(run: Trainer, other: Trainer) -> None:
    torch.testing.assert_close(network_weights(run), network_weights(other), rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[Trainer, Path]:
    """Two epochs with our algorithm, and the folder of the checkpoints after each."""
    folder = tmp_path_factory.mktemp("ours")
    run = trainer([SqueezeExcite(**OPTIONS)], save_folder=str(folder))
    run.fit()
    return run, folder


@pytest.fixture(scope="module")
def builtin_run(tmp_path_factory) -> tuple[Trainer, Path]:
    """The same with Composer's own algorithm."""
    folder = tmp_path_factory.mktemp("builtin")
    run = trainer([BUILTIN(4, 16)], save_folder=str(folder))
    run.fit()
    return run, folder


def test_matches_the_init_event_only() -> None:
    algorithm = SqueezeExcite()
    state: Any = None
    assert [event for event in Event if algorithm.match(event, state)] == [Event.INIT]


def test_is_required_on_load() -> None:
    assert SqueezeExcite.required_on_load()


def test_wraps_convs_trains_them_and_records_it(caplog) -> None:
    memory = InMemoryLogger()
    with caplog.at_level("INFO", "composer_se"):
        run = trainer([SqueezeExcite(4, 16)], loggers=[memory])
    assert num_layers(run) == 3
    added = 2 * (2 * 4 * 16) + 2 * 4 * 32
    assert memory.hyperparameters["squeeze_excite/num_squeeze_excite_layers"] == 3
    assert memory.hyperparameters["squeeze_excite/num_added_parameters"] == added
    assert f"SE on 3 of 3 convs, {added} parameters added" in caplog.text
    before = network_weights(run)
    run.fit(duration="1ep")
    changed = {name for name, value in network_weights(run).items() if not torch.equal(value, before[name])}
    assert {name for name in before if ".se." in name} <= changed


def test_parameter_groups_do_not_hinder_it() -> None:
    model = ComposerClassifier(conv_norm_net((16, 16)), num_classes=4)
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.SGD([{"params": weights, "weight_decay": 0.1}, {"params": others}], lr=0.1)
    run = Trainer(
        model=model,
        optimizers=optimizer,
        algorithms=[SqueezeExcite(4, 16)],
        train_dataloader=loader(),
        max_duration="1ba",
        progress_bar=False,
    )
    run.fit()
    decayed = set(run.state.optimizers[0].param_groups[0]["params"])
    blocks = {parameter for name, parameter in run.state.model.named_parameters() if ".se." in name}
    assert len(blocks) == 4
    assert blocks <= decayed


def test_include_patterns_are_those_of_the_bare_network() -> None:
    run = trainer([SqueezeExcite(4, 16, include="3")])
    wrapped = [name for name, module in run.state.model.named_modules() if isinstance(module, SqueezeExciteConv2d)]
    assert wrapped == ["module.3"]


def test_initial_weights_depend_on_the_seed_of_rank_zero_alone() -> None:
    run = trainer([SqueezeExcite(4, 16)])
    cf.remove_squeeze_excite(run.state.model, run.state.optimizers)
    torch.manual_seed(99)
    generator_before = torch.get_rng_state()
    SqueezeExcite(4, 16).apply(Event.INIT, run.state, run.logger)
    assert torch.equal(torch.get_rng_state(), generator_before)
    expected = network_weights(trainer([SqueezeExcite(4, 16)]))
    torch.testing.assert_close(network_weights(run), expected, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda algorithm: pickle.loads(pickle.dumps(algorithm))])
def test_repr_recreates_it_and_it_can_be_pickled(copied) -> None:
    algorithm = SqueezeExcite(0.25, "auto", min_channels_of="both", include="layer4", exclude=["a", "b"])
    assert repr(eval(repr(algorithm), {"composer_se": composer_se})) == repr(algorithm)
    assert repr(copied(algorithm)) == repr(algorithm)
    assert type(copied(algorithm)) is SqueezeExcite


def test_repr_needs_nothing_but_the_package() -> None:
    algorithm = SqueezeExcite(np.int64(32), np.int32(16))
    assert repr(algorithm).startswith("composer_se.SqueezeExcite(latent_channels=32, min_channels=16,")


def test_attributes_of_a_subclass_are_no_options() -> None:
    class Named(SqueezeExcite):
        def __init__(self) -> None:
            super().__init__(4, 16)
            self.note = "mine"

    assert num_layers(trainer([Named()])) == 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"latent_channels": 0}, ValueError),
        ({"latent_channels": True}, TypeError),
        ({"min_channels": -1}, ValueError),
        ({"min_channels": "some"}, TypeError),
        ({"min_channels_of": "input"}, ValueError),
        ({"include": 3}, TypeError),
        ({"exclude": [None]}, TypeError),
    ],
)
def test_wrong_arguments_are_refused_when_it_is_made(arguments, error) -> None:
    with pytest.raises(error):
        SqueezeExcite(**arguments)


def test_resuming_restores_exactly_and_adds_nothing(whole_run) -> None:
    uninterrupted, folder = whole_run
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*required_on_load.*")
        resumed = trainer([SqueezeExcite(**OPTIONS)], load_path=str(folder / "ep1.pt"))
    assert [type(algorithm) for algorithm in resumed.state.algorithms] == [SqueezeExcite]
    assert num_layers(resumed) == 2
    resumed.fit()
    assert_equal_weights(resumed, uninterrupted)


def test_checkpoint_that_needs_the_algorithm_adds_it(whole_run) -> None:
    uninterrupted, folder = whole_run
    with pytest.warns(UserWarning, match=r"Automatically adding required_on_load algorithm composer_se\.SqueezeExcite"):
        resumed = trainer([], load_path=str(folder / "ep1.pt"))
    assert [type(algorithm) for algorithm in resumed.state.algorithms] == [SqueezeExcite]
    assert num_layers(resumed) == 2
    resumed.fit()
    assert_equal_weights(resumed, uninterrupted)


def test_inplace_of_earlier_versions_is_answered_by_one_warning_and_changes_nothing(whole_run, caplog) -> None:
    uninterrupted, _ = whole_run
    run = trainer([SqueezeExcite(**OPTIONS, inplace=False)])
    run.fit()
    assert warnings_of_inplace(caplog) == ["inplace=False is not needed any more and does nothing: leave it out."]
    assert repr(run.state.algorithms[0]) == repr(SqueezeExcite(**OPTIONS))
    assert_equal_weights(run, uninterrupted)


def warnings_of_inplace(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "inplace" in message]


def test_checkpoint_of_an_earlier_version_that_needs_the_algorithm_adds_it(whole_run, tmp_path, caplog) -> None:
    uninterrupted, folder = whole_run
    checkpoint = torch.load(folder / "ep1.pt", weights_only=False)
    ((_, stored),) = checkpoint["state"]["algorithms"]
    stored["repr"] = stored["repr"].replace(")", ", inplace='auto')")
    torch.save(checkpoint, tmp_path / "ep1.pt")
    with pytest.warns(UserWarning, match=r"Automatically adding required_on_load algorithm composer_se\.SqueezeExcite"):
        resumed = trainer([], load_path=str(tmp_path / "ep1.pt"))
    assert warnings_of_inplace(caplog) == ["inplace='auto' is not needed any more and does nothing: leave it out."]
    resumed.fit()
    assert_equal_weights(resumed, uninterrupted)


def test_algorithm_can_be_left_out_by_the_name_that_the_message_gives(whole_run) -> None:
    _, folder = whole_run
    run = trainer(
        [],
        load_path=str(folder / "ep1.pt"),
        load_exclude_algorithms=["composer_se.SqueezeExcite"],
        load_weights_only=True,
        load_strict_model_weights=False,
    )
    assert num_layers(run) == 0


@pytest.mark.parametrize("exclude", [None, ["SqueezeExcite"]])
def test_checkpoint_of_composers_algorithm_goes_on_with_ours(builtin_run, exclude) -> None:
    uninterrupted, folder = builtin_run
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = str(folder / "ep1.pt")
        resumed = trainer([SqueezeExcite(**OPTIONS)], load_path=path, load_exclude_algorithms=exclude)
    assert any("required_on_load" in str(warning.message) for warning in caught) == (exclude is None)
    assert [type(algorithm) for algorithm in resumed.state.algorithms] == [SqueezeExcite, BUILTIN][: 1 + (not exclude)]
    assert num_layers(resumed) == 2
    assert num_layers(resumed, composer.algorithms.squeeze_excite.SqueezeExciteConv2d) == 0
    assert surgery.count_module_instances(resumed.state.model, nn.Conv2d) == 3
    resumed.fit()
    for name, value in network_weights(resumed).items():
        torch.testing.assert_close(value, network_weights(uninterrupted)[name], rtol=1e-4, atol=1e-5)


def test_convs_that_ours_leaves_out_get_composers_blocks_from_its_checkpoint(builtin_run) -> None:
    _, folder = builtin_run
    options: dict[str, Any] = {"load_path": str(folder / "ep1.pt"), "load_weights_only": True}
    run = trainer([SqueezeExcite(4, 32)], **options)
    assert num_layers(run) == num_layers(run, composer.algorithms.squeeze_excite.SqueezeExciteConv2d) == 1
    with pytest.raises(RuntimeError, match="Missing key|Unexpected key|size mismatch"):
        trainer([SqueezeExcite(4, 32)], load_exclude_algorithms=["SqueezeExcite"], **options)


def test_checkpoint_of_composer_before_0_12_loads(whole_run, tmp_path) -> None:
    uninterrupted, folder = whole_run
    checkpoint = torch.load(folder / "ep1.pt", weights_only=False)
    checkpoint["state"]["algorithms"] = dict(checkpoint["state"]["algorithms"])
    torch.save(checkpoint, tmp_path / "ep1.pt")
    resumed = trainer([SqueezeExcite(**OPTIONS)], load_path=str(tmp_path / "ep1.pt"))
    resumed.fit()
    assert_equal_weights(resumed, uninterrupted)


def test_our_checkpoint_goes_back_to_composers_algorithm(whole_run) -> None:
    _, folder = whole_run
    run = trainer(
        [BUILTIN(4, 16)],
        load_path=str(folder / "ep1.pt"),
        load_weights_only=True,
        load_exclude_algorithms=["composer_se.SqueezeExcite"],
    )
    restored = torch.load(folder / "ep1.pt", weights_only=False)["state"]["model"]
    for name, value in network_weights(run).items():
        assert torch.equal(value, restored[name]), name


def test_composers_own_algorithm_stays_what_it_was(builtin_run) -> None:
    uninterrupted, folder = builtin_run
    assert composer.algorithms.SqueezeExcite is BUILTIN
    assert BUILTIN.__module__.startswith("composer.")
    builtin_layer = composer.algorithms.squeeze_excite.SqueezeExciteConv2d
    assert num_layers(uninterrupted, builtin_layer) == 2
    with pytest.warns(UserWarning, match=r"Automatically adding required_on_load algorithm SqueezeExcite\("):
        resumed = trainer([], load_path=str(folder / "ep1.pt"))
    assert [type(algorithm) for algorithm in resumed.state.algorithms] == [BUILTIN]
    assert num_layers(resumed, builtin_layer) == 2
    resumed.fit()
    assert_equal_weights(resumed, uninterrupted)


def test_weights_from_before_the_surgery_load(tmp_path) -> None:
    plain = trainer([], save_folder=str(tmp_path))
    plain.fit(duration="1ep")
    run = trainer(
        [SqueezeExcite(4, 16)],
        load_path=str(tmp_path / "ep1.pt"),
        load_weights_only=True,
        load_strict_model_weights=False,
    )
    before = network_weights(plain)
    for name, value in network_weights(run).items():
        if ".se." not in name:
            assert torch.equal(value, before[name.replace(".conv.", ".")]), name


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_imports_no_composer_but_is_known_to_it_whatever_comes_first() -> None:
    assert run_python("import sys, composer_se.functional; print('composer' in sys.modules)") == "False"
    known = "import composer.algorithms as a; print(getattr(a, 'composer_se.SqueezeExcite').required_on_load())"
    assert run_python(f"import composer; import composer_se; {known}") == "True"
    looked_up = "import composer_se, importlib.util; importlib.util.find_spec('composer')"
    assert run_python(f"{looked_up}; import composer; {known}") == "True"
