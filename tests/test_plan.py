"""`composer_se.plan` and `composer-se plan` show what `apply_squeeze_excite` does."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import mobilenet_v3_small, resnet18, resnet50

import composer_se
from composer_se import SqueezeExciteConv2d, apply_squeeze_excite, plan
from composer_se.cli import main
from composer_se.planning import _products


class TwoConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.second = nn.Conv2d(8, 16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(images))


def multiply_adds(model: nn.Module, image_size: int) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta").eval()(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


def test_plan_agrees_layer_by_layer_with_the_model_after_surgery() -> None:
    with torch.device("meta"):
        model = resnet50()
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    planned = plan(model, min_channels=512, image_size=224)
    map_sizes: dict[str, tuple[int, ...]] = {}
    for name, conv in before.items():

        def remember(_: nn.Module, __: object, output: torch.Tensor, name: str = name) -> None:
            map_sizes[name] = tuple(output.shape[2:])

        conv.register_forward_hook(remember)
    parameters, arithmetic = sum(p.numel() for p in model.parameters()), multiply_adds(model, 224)

    added = apply_squeeze_excite(model, min_channels=512)

    assert [conv.name for conv in planned.convs] == list(before)
    assert [conv.name for conv in planned.chosen] == list(added)
    for conv in planned.convs:
        assert (conv.in_channels, conv.out_channels) == (before[conv.name].in_channels, before[conv.name].out_channels)
        assert conv.map_size == map_sizes[conv.name]
        assert conv.reason == ("chosen" if conv.chosen else f"{conv.out_channels} channels < 512")
    for conv in planned.chosen:
        block = added[conv.name].se
        assert conv.latent_channels == block.latent_channels
        assert conv.added_parameters == sum(parameter.numel() for parameter in block.parameters())
        assert conv.added_multiply_adds == multiply_adds_of_block(block, conv.out_channels)
    assert planned.parameters == parameters
    assert planned.added_parameters == sum(p.numel() for p in model.parameters()) - parameters
    assert planned.multiply_adds == arithmetic
    assert planned.added_multiply_adds == multiply_adds(model, 224) - arithmetic


def multiply_adds_of_block(block: nn.Module, channels: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(torch.empty(1, channels, 2, 2, device="meta"))
    return counter.get_total_flops() // 2


def test_convs_that_share_a_norm_share_its_block() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.conv2, self.norm2 = nn.Conv2d(8, 8, 3), self.norm1

    added = plan(Net(), 4, 8, placement="norm").added_parameters
    layers = apply_squeeze_excite(model := Net(), 4, 8, placement="norm")
    assert added == sum(p.numel() for layer in layers.values() for p in layer.se.parameters()) == 64  # pyright: ignore
    assert plan(model, 4, 8, placement="norm").added_parameters == 0


def test_planning_leaves_the_model_alone() -> None:
    model = TwoConvs().train()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plan(model, min_channels=8, image_size=(9, 7))
    assert not any(isinstance(module, SqueezeExciteConv2d) for module in model.modules())
    assert model.training
    assert not model.first._forward_hooks
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, weights[name])


def test_map_sizes_and_gated_share_of_an_oblong_image() -> None:
    planned = plan(TwoConvs(), min_channels=16, image_size=(9, 7))
    assert [conv.map_size for conv in planned.convs] == [(4, 3), (2, 1)]
    assert planned.gated_share == pytest.approx(16 * 2 / (8 * 12 + 16 * 2))
    assert plan(TwoConvs(), min_channels=16).gated_share is None


def test_a_conv_that_is_called_twice_adds_its_arithmetic_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(images))

    (conv,) = plan(Twice(), 4, 1, image_size=8).convs
    assert (conv.added_parameters, conv.added_multiply_adds, conv.map_size) == (24, 48, (6, 6))


def test_a_composer_model_is_planned_like_the_network_in_it() -> None:
    from composer.models import ComposerClassifier

    network = TwoConvs()
    wrapped = plan(ComposerClassifier(network, num_classes=16), min_channels=8, image_size=9)
    assert [conv.map_size for conv in wrapped.convs] == [conv.map_size for conv in plan(network, image_size=9).convs]


def test_auto_is_resolved_and_narrow_blocks_are_noted() -> None:
    planned = plan(resnet18(), latent_channels=0.0625, min_channels="auto")
    assert planned.threshold == 512
    assert "resolves to 512" in repr(planned)
    assert "narrower than the recommended 64" in planned.notes[0]
    assert plan(resnet18(), min_channels="auto").notes == ()


def test_a_model_that_cannot_run_on_shapes_is_planned_without_maps() -> None:
    class NeedsValues(TwoConvs):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) if images.mean().item() > 0 else images

    planned = plan(NeedsValues(), min_channels=16, image_size=9)
    assert [conv.chosen for conv in planned.convs] == [False, True]
    assert [conv.map_size for conv in planned.convs] == [None, None]
    assert "map sizes are unknown" in planned.notes[0]


def test_reasons_name_the_pattern_and_the_existing_block() -> None:
    planned = plan(mobilenet_v3_small(), min_channels=64, exclude="features.12.*")
    reasons = {conv.name: conv.reason for conv in planned.convs}
    assert reasons["features.12.0"] == "excluded by 'features.12.*'"
    assert "inside the SE block" in reasons["features.1.block.1.fc1"]
    assert reasons["features.0.0"] == "16 channels < 64"


def test_groups_cover_every_conv_once() -> None:
    planned = plan(resnet50(), min_channels=512, image_size=64)
    grouped = planned.grouped()
    assert len(grouped) < len(planned.convs) / 2
    assert sum(group.num_convs for group in grouped) == len(planned.convs)
    assert sum(group.num_convs * group.added_parameters for group in grouped) == planned.added_parameters
    assert "layer3.{0..5}.conv3" in [group.name for group in grouped]


def test_products_are_few_and_exact() -> None:
    rows = [(0, 1), (0, 2), (1, 2), (2, 2)]
    assert _products(rows) == [[[0], [1]], [[0, 1, 2], [2]]]


def test_rows_suit_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    planned = plan(TwoConvs(), min_channels=16, image_size=9)
    frame = pandas.DataFrame(planned.to_dicts())
    assert list(frame["name"]) == ["first", "second"]
    assert frame["added_parameters"].sum() == planned.added_parameters
    assert list(frame["map_height"]) == [4, 2]


def test_a_model_that_has_blocks_is_planned_as_it_is() -> None:
    model = TwoConvs()
    apply_squeeze_excite(model, 4, 16)
    planned = plan(model, 4, 8, image_size=9)
    assert [(conv.name, conv.chosen, conv.latent_channels, conv.map_size) for conv in planned.convs] == [
        ("first", True, 4, (4, 4)),
        ("second.conv", False, 4, (2, 2)),
    ]
    assert planned.convs[1].reason == "has SE already"


def test_image_size_is_checked() -> None:
    with pytest.raises(ValueError, match="image_size is 0"):
        plan(TwoConvs(), image_size=0)


def test_command_prints_a_table_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "resnet50", "--image-size", "224", "--min-channels", "512"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "layer4.{0..2}.conv3" in out
    assert "22 of 53 convs" in out


def test_command_writes_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "resnet18", "--min-channels", "auto", "--exclude", "layer4.0", "--latent-channels", "0.25"]
    assert main(["plan", *arguments, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = composer_se.plan(resnet18(), 0.25, "auto", exclude="layer4.0")
    assert found["threshold"] == 512
    assert found["convs"] == expected.to_dicts()
    assert found["added_parameters"] == expected.added_parameters


def test_command_takes_settings_and_image_size_from_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "digits"]) == 0
    out = capsys.readouterr().out
    assert "min_channels=auto (resolves to 64)" in out
    assert "multiply-adds of a 8×8 image" in out


def test_command_prefers_its_own_image_size_to_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "digits", "--image-size", "16x24", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["image_size"] == [16, 24]


@pytest.mark.parametrize(("option", "value"), [("--latent-channels", "1.5"), ("--min-channels", "many")])
def test_command_names_the_option_that_is_wrong(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "resnet18", option, value]) == 2
    assert capsys.readouterr().err.startswith(f"composer-se plan: error: {option} {value}: ")


def test_command_says_in_one_line_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "resnet18", "--include", "layer9.*"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "layer9.*" in error
