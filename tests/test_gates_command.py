"""`composer-se gates`: what it finds is what the gates do, on a network of the user's."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import final_accuracy
from torch import Tensor, nn
from two_process_gates import small_network

from composer_se import apply_squeeze_excite
from composer_se.cli import main
from composer_se.errors import UserError
from composer_se.gates.analysis import Analysis, analyse, score
from composer_se.gates.observe import se_blocks
from composer_se.show.pictures import new_figure

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def network() -> nn.Sequential:
    network = small_network()
    apply_squeeze_excite(network, 4, 8)
    with torch.no_grad():
        for block in (network[0].se, network[3].se):
            block.pool_and_mlp["4"].weight *= 20  # gates that move, so that fixing them matters
    return network.eval()


@pytest.fixture
def batches() -> Batches:
    labels = torch.arange(40) % 3
    images = torch.randn(40, 1, 8, 8) + labels.view(-1, 1, 1, 1)
    return [(images[:25], labels[:25]), (images[25:], labels[25:])]


def gates_of(network: nn.Sequential, layer: int, batches: Batches) -> Tensor:
    """The gates by the plain formula, (N, C)."""
    wrapper = network[layer]
    w1, w2 = wrapper.se.parameters()
    with torch.no_grad():
        means = torch.cat([wrapper.conv(network[:layer](images)).mean((2, 3)) for images, _ in batches])
        return torch.sigmoid(torch.relu(means @ w1.T) @ w2.T)


def test_statistics_by_class_are_those_of_the_gates(network: nn.Sequential, batches: Batches) -> None:
    labels = torch.cat([labels for _, labels in batches])
    analysis = analyse(network, batches)
    assert [layer.name for layer in analysis.layers] == ["0", "3"]
    assert analysis.num_images == 40
    for layer in analysis.layers:
        gates = gates_of(network, int(layer.name), batches).double()
        torch.testing.assert_close(layer.channel_means, gates.mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(layer.channel_stds, gates.std(0, correction=0), atol=1e-6, rtol=0)
        means = torch.stack([gates[labels == k].mean(0) for k in range(3)])
        torch.testing.assert_close(layer.class_channel_means[:3], means, atol=1e-6, rtol=0)
        assert layer.by_class[3:] == [None] * 7  # classes the network knows and the images lack
        by_class = layer.by_class[1]
        assert by_class is not None
        assert by_class.std_over_samples == pytest.approx(
            float(gates[labels == 1].var(0, correction=0).mean().sqrt()), abs=1e-6
        )
        explained = (means[labels] - gates.mean(0)).square().sum() / (gates - gates.mean(0)).square().sum()
        assert layer.class_share == pytest.approx(float(explained), abs=1e-5)
        assert 0 < layer.class_share < 1


def test_fixing_a_gate_is_folding_its_mean_into_the_conv(network: nn.Sequential, batches: Batches) -> None:
    analysis = analyse(network, batches)
    for index, layer in zip((0, 3), analysis.layers, strict=True):
        folded = copy.deepcopy(network)
        conv, mean = folded[index].conv, gates_of(network, index, batches).mean(0)
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        with torch.no_grad():
            conv.weight *= mean.view(-1, 1, 1, 1)
            conv.bias *= mean
        folded[index] = conv
        accuracy, changed = accuracy_of(folded, network, batches)
        assert layer.ablation.accuracy == pytest.approx(accuracy)
        assert layer.ablation.change.value == pytest.approx(accuracy - analysis.accuracy)
        assert changed > 0


@torch.no_grad()
def accuracy_of(network: nn.Module, other: nn.Module, batches: Batches) -> tuple[float, int]:
    """The accuracy, and for how many images the outputs are not those of the other network."""
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    outputs = network(images)
    changed = (outputs - other(images)).abs().amax(1) > 1e-4
    return float((outputs.argmax(1) == labels).double().mean()), int(changed.sum())


def test_the_network_is_left_as_it_was(network: nn.Sequential, batches: Batches) -> None:
    before = copy.deepcopy(network.state_dict())
    analyse(network, batches)
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_interval_of_a_change_comes_from_the_verdicts_that_change() -> None:
    before, after = torch.ones(1000, dtype=torch.bool), torch.ones(1000, dtype=torch.bool)
    before[:100], after[100:140] = False, False  # a hundred gained, forty lost
    ablation = score(before, after)
    assert ablation.accuracy == 0.96
    assert ablation.change.value == pytest.approx(0.06)
    differences = after.double() - before.double()
    assert ablation.change.half_width == pytest.approx(1.96 * float(differences.std()) / math.sqrt(1000), rel=0.01)
    assert ablation.harmless
    assert not score(torch.ones(1000, dtype=torch.bool), before).harmless


def test_no_change_on_few_images_is_not_certain() -> None:
    same = torch.ones(360, dtype=torch.bool)
    change = score(same, same).change
    assert change.value == 0
    assert change.half_width == pytest.approx(1.96 / 362)


def test_labels_must_be_class_numbers(network: nn.Sequential) -> None:
    with pytest.raises(UserError, match="expected one class number per image"):
        analyse(network, [(torch.randn(2, 1, 8, 8), torch.rand(2, 10))])


def test_a_label_that_the_network_does_not_know_is_named(network: nn.Sequential) -> None:
    with pytest.raises(UserError, match="label 10, but the network has 10 outputs; name"):
        analyse(network, [(torch.randn(2, 1, 8, 8), torch.tensor([0, 10]))])


def test_layers_that_never_run_have_no_gates_to_show(network: nn.Sequential, batches: Batches) -> None:
    network.forward = lambda images: torch.zeros(len(images), 10)
    with pytest.raises(UserError, match="forward pass runs none of them"):
        analyse(network, batches)


def test_names_show_no_wrapper_of_the_model(network: nn.Sequential) -> None:
    wrapped = nn.Module()
    wrapped.add_module("module", network)
    names = list(se_blocks(network))
    assert list(se_blocks(torch.compile(wrapped))) == names  # pyright: ignore[reportArgumentType]


def test_command_on_a_run_writes_picture_and_numbers(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(digits_run, tmp_path / "moved"))
    assert main(["gates", str(run), "--device", "cpu"]) == 0
    found = json.loads((run / "gates" / "gates.json").read_text())
    layers = [f"stage3.{block}.conv{conv}" for block in range(3) for conv in (1, 2)]
    assert [layer["name"] for layer in found["layers"]] == layers
    assert found["num_images"] == 360
    assert found["accuracy"] == pytest.approx(final_accuracy(run), abs=1e-6)
    assert all(len(layer["by_class"]) == 10 for layer in found["layers"])
    assert (run / "gates" / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert "Gates after training" in (run / "report.html").read_text()
    out = capsys.readouterr().out
    assert all(layer in out for layer in layers)
    assert max(map(len, out.split("Written:")[0].splitlines())) <= 80


def test_command_on_a_checkpoint_outside_of_its_run(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "far" / "away" / "weights.pt"
    checkpoint.parent.mkdir(parents=True)
    shutil.copy(digits_run / "checkpoints" / "latest-rank0.pt", checkpoint)
    assert main(["gates", str(checkpoint)]) == 2
    assert "--recipe" in capsys.readouterr().err
    out = tmp_path / "out"
    recipe = str(digits_run / "recipe.yaml")
    assert main(["gates", str(checkpoint), "--recipe", recipe, "--data", "digits", "--out", str(out)]) == 0
    assert json.loads((out / "gates.json").read_text())["name"] == "weights"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "no such run folder or checkpoint"),
        (["RUN", "--data", "digit"], "did you mean 'digits'?"),
        (["RUN", "--recipe", "WITHOUT_SE"], "does not fit the recipe's network"),
        (["RUN", "--device", "abacus"], "--device abacus"),
        (["RUN", "--device", "meta"], "--device meta"),
    ],
)
def test_mistakes_are_named_in_one_line(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    without_se = tmp_path / "without.yaml"
    recipe = (digits_run / "recipe.yaml").read_text()
    without_se.write_text(recipe.replace("min_channels: auto", "min_channels: 16"))
    places = {"RUN": str(digits_run), "WITHOUT_SE": str(without_se)}
    assert main(["gates", *(places.get(argument, argument) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.strip().count("\n") == 0


def test_many_layers_share_one_picture(tmp_path: Path, network: nn.Sequential, batches: Batches) -> None:
    from composer_se.gates.picture import draw

    analysis = analyse(network, batches)
    many = Analysis(analysis.layers * 15, analysis.accuracy, analysis.num_images)
    draw("Gates of many", many, [str(k) for k in range(10)], tmp_path / "gates.svg")
    assert "20 of 30 layers" in (tmp_path / "gates.svg").read_text()


@pytest.mark.parametrize(("init", "limit"), [("default", 1), ("identity", 2)])
def test_the_axis_of_the_picture_reaches_as_far_as_gates_can(
    init: str, limit: int, tmp_path: Path, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    from composer_se.gates import picture

    figures = []
    monkeypatch.setattr(picture, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[0])
    network = small_network()
    apply_squeeze_excite(network, 4, 8, init=init)
    picture.draw("Gates", analyse(network.eval(), batches), [str(k) for k in range(10)], tmp_path / "gates.png")
    panels = [axis for axis in figures[0].axes if axis.get_title() in ("0", "3")]
    assert [axis.get_ylim() for axis in panels] == [(0, limit)] * 2


def test_held_out_images_of_other_classes_are_refused(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(digits_run, tmp_path / "digits", symlinks=True))
    (run / "classes.json").write_text(json.dumps(["zero", *map(str, range(1, 10))]))
    assert main(["gates", str(run)]) == 2
    assert "its classes are not those that the network was trained on ('0', 'zero')" in capsys.readouterr().err
