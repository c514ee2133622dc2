"""A run starts from a checkpoint or from a plain state dict, and says in one line why it can't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import composer_se
from composer_se.commands.train import run_recipe
from composer_se.errors import UserError
from composer_se.parts.models import build_network

SHORT = ("max_duration=1ba", "train_batch_size=16", "eval_dataset=null", "progress_bar=false", "device=cpu")
STILL = ("optimizer.lr=0", "optimizer.weight_decay=0", "scheduler=null")  # the weights stay what was loaded
LENIENT = "load_strict_model_weights=false"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save_weights(path: str, with_se: bool = False, **arguments: int) -> dict[str, torch.Tensor]:
    network = build_network("cifar_resnet20", in_channels=1, **arguments)
    if with_se:
        composer_se.apply_squeeze_excite(network, min_channels="auto")
    torch.save(network.state_dict(), path)
    return network.state_dict()


def trained_weights() -> dict[str, torch.Tensor]:
    model = torch.load("runs/digits/checkpoints/latest-rank0.pt", weights_only=False)["state"]["model"]
    return {name.removeprefix("module."): weight for name, weight in model.items()}


def run(*overrides: str) -> int:
    return run_recipe("digits", (*SHORT, *overrides))


def test_weights_from_before_the_surgery_load_when_se_may_be_missing(capfd: pytest.CaptureFixture[str]) -> None:
    weights = save_weights("plain.pt")
    with pytest.raises(UserError, match=r"load_path: plain\.pt: lacks 12 .*load_strict_model_weights=false"):
        run("load_path=plain.pt")
    assert not Path("runs").exists()
    assert run("load_path=plain.pt", LENIENT, *STILL) == 0
    network = 12 + len(weights)
    said = f"load_path: plain.pt: loaded {len(weights)} of the network's {network} weights; it holds 0 others."
    assert said in capfd.readouterr().err
    found = trained_weights()
    assert torch.equal(found["stage3.0.conv1.conv.weight"], weights["stage3.0.conv1.weight"])
    assert torch.equal(found["fc.weight"], weights["fc.weight"])


def test_weights_from_after_the_surgery_load_strictly_and_a_resumed_run_keeps_its_own() -> None:
    weights = save_weights("se.pt", with_se=True)
    assert run("load_path=se.pt", *STILL) == 0
    found = trained_weights()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items() if name.endswith("weight"))
    save_weights("se.pt", with_se=True)  # other numbers
    assert run("load_path=se.pt", *STILL, "max_duration=2ba") == 0
    assert torch.equal(trained_weights()["fc.weight"], weights["fc.weight"])


def test_blocks_with_another_start_are_refused_with_the_key_to_set() -> None:
    save_weights("se.pt", with_se=True)
    key = r"algorithms\.squeeze_excite\.init"
    with pytest.raises(UserError, match=rf"load_path: se\.pt: .*init=\"default\".* Set {key}"):
        run("load_path=se.pt", "algorithms.squeeze_excite.init=identity", LENIENT)


def test_weights_of_another_shape_can_be_left_out() -> None:
    save_weights("seven.pt", num_classes=7)
    with pytest.raises(UserError, match=r"load_path: seven\.pt: .*fc\.weight.*load_ignore_keys"):
        run("load_path=seven.pt", LENIENT)
    assert run("load_path=seven.pt", LENIENT, "load_ignore_keys=[fc.*]") == 0


def test_what_is_neither_a_checkpoint_nor_a_state_dict_is_refused() -> None:
    Path("text.pt").write_text("weights")
    torch.save({"model": {}}, "nested.pt")
    save_weights("other.pt")
    torch.save({f"other.{name}": weight for name, weight in torch.load("other.pt").items()}, "other.pt")
    for path, message in (("text.pt", "can't be read"), ("nested.pt", "neither"), ("other.pt", "holds none of")):
        with pytest.raises(UserError, match=rf"load_path: {path}: .*{message}"):
            run(f"load_path={path}", LENIENT)
    assert not Path("runs").exists()


def test_a_checkpoint_of_another_network_is_refused_in_one_line() -> None:
    assert run("run_name=first") == 0
    checkpoint = "runs/first/checkpoints/latest-rank0.pt"
    with pytest.raises(UserError, match=r"load_path: .*loading state_dict.*load_strict_model_weights=false") as error:
        run(f"load_path={checkpoint}", "load_weights_only=true", "model.name=cifar_resnet8")
    assert "\n" not in str(error.value)


def test_a_new_run_is_told_where_the_clock_of_a_checkpoint_stands(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("run_name=first") == 0
    load = "load_path=runs/first/checkpoints/latest-rank0.pt"
    with pytest.raises(
        UserError, match=r"a checkpoint of epoch 0, batch 1, where max_duration=1ba ends; .*load_weights_only"
    ):
        run(load)
    assert not Path("runs/digits").exists()
    capfd.readouterr()
    assert run(load, "run_name=longer", "max_duration=2ba") == 0
    assert "starting runs/longer from runs/first/checkpoints/latest-rank0.pt, a checkpoint of" in capfd.readouterr().err
    assert run(load, "run_name=longer", "max_duration=3ba") == 0
    assert "continuing runs/longer from its checkpoint of epoch 0, batch 2" in capfd.readouterr().err
    assert run(load, "load_weights_only=true") == 0


def test_a_complete_run_with_another_load_path_is_another_run() -> None:
    assert run() == 0
    save_weights("se.pt", with_se=True)
    with pytest.raises(UserError, match=r"load_path \(was null, now 'se\.pt'\)"):
        run("load_path=se.pt")
