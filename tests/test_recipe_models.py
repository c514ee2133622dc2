"""Networks by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from composer_se.cli import main
from composer_se.errors import UserError
from composer_se.parts.cifar_resnet import CIFARResNet
from composer_se.parts.models import build_network, network_names


@pytest.mark.parametrize(("depth", "millions"), [(8, 0.08), (20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_papers_size(depth: int, millions: float) -> None:
    network = build_network(f"cifar_resnet{depth}")
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in network.modules())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert layers == depth
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.005)


def test_cifar_resnet_halves_the_map_twice_and_takes_any_channels() -> None:
    network = build_network("cifar_resnet20", num_classes=7, in_channels=5)
    shapes = []
    for stage in (network.stage1, network.stage2, network.stage3):
        stage.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))  # type: ignore[union-attr]
    assert network(torch.randn(2, 5, 32, 32)).shape == (2, 7)
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


def test_cifar_resnet_refuses_other_depths() -> None:
    with pytest.raises(ValueError, match="6n"):
        CIFARResNet(21)


def test_torchvision_networks_build_by_name_with_their_arguments() -> None:
    network = build_network("resnet18", num_classes=5, zero_init_residual=True)
    assert network.fc.out_features == 5  # type: ignore[union-attr]
    assert not network.layer1[0].bn2.weight.any()  # type: ignore[index, union-attr]
    assert "fasterrcnn_resnet50_fpn" not in network_names()


def test_timm_networks_build_by_name() -> None:
    pytest.importorskip("timm")
    assert build_network("timm/resnet18", num_classes=3)(torch.randn(2, 3, 64, 64)).shape == (2, 3)


NETWORK = """
from __future__ import annotations
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes: int, width: int = 4) -> None:
        super().__init__(nn.Conv2d(1, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

def broken():
    raise KeyError("weights")

def no_network():
    return 3
"""


@pytest.fixture
def own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_network_of_mine.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "a_network_of_mine", raising=False)


@pytest.mark.usefixtures("own_network")
def test_networks_of_the_users_own_build_from_the_current_folder_with_their_arguments() -> None:
    network = build_network("a_network_of_mine:Net", classes="3", width=8)
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    for wrong, message in (
        ({"clases": 3}, r"model\.clases: unknown argument of a_network_of_mine:Net; did you mean 'classes'"),
        ({}, r"model\.classes: required"),
        ({"classes": "three"}, r"model\.classes: expected a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            build_network("a_network_of_mine:Net", **wrong)
    with pytest.raises(UserError, match=r"model.name: a_network_of_mine:broken fails \(KeyError: 'weights'\)"):
        build_network("a_network_of_mine:broken")
    with pytest.raises(UserError, match=r"a_network_of_mine:no_network returned a int"):
        build_network("a_network_of_mine:no_network")


@pytest.mark.usefixtures("own_network")
def test_a_network_of_the_users_own_trains_and_its_gates_are_shown() -> None:
    options = ["model={name: 'a_network_of_mine:Net', classes: 10}", "max_duration=2ba", "train_batch_size=16"]
    options += ["progress_bar=false", "eval_subset_num_batches=1", "algorithms.squeeze_excite.min_channels=1"]
    assert main(["train", "digits", *options]) == 0
    assert main(["gates", "runs/digits"]) == 0
    assert Path("runs/digits/gates/gates.png").is_file()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet5", {}, "did you mean 'resnet"),
        ("timm/nosuchthing", {}, "model.name"),
        ("resnet18", {"num_class": 3}, "did you mean 'num_classes'"),
        ("resnet18", {"weights": "IMAGENET"}, "no file 'IMAGENET'.*did you mean 'IMAGENET1K_V1'"),
        ("googlenet", {}, "model.aux_logits"),
    ],
)
def test_wrong_names_and_arguments_are_refused(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_network(name, **arguments)
