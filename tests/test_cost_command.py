"""`composer-se cost` from the command line, and how its network is named."""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from torch import nn

from composer_se.cli import main
from composer_se.commands.network import add_network_arguments, read_network
from composer_se.errors import UserError
from composer_se.options import SqueezeExciteOptions

FACTORIES = """
from torch import nn

def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )

def broken():
    raise RuntimeError("out of order")

def no_network():
    return 7

number = 7
"""

RECIPE = """
model: {name: cifar_resnet20, num_classes: 7, in_channels: 1}
train_dataset: {name: synthetic}
optimizer: {name: decoupled_sgdw, lr: 0.1}
algorithms:
  squeeze_excite: {latent_channels: 5, min_channels: 32, min_channels_of: both}
max_duration: 1ep
train_batch_size: 8
"""

SMALL = ["--batch-size", "2", "--image-size", "8", "--device", "cpu", "--repeats", "1", "--instances", "2"]


@pytest.fixture(autouse=True)
def in_a_folder_with_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_networks.py").write_text(FACTORIES)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def test_a_run_prints_tables_of_80_columns_and_writes_json_and_plot(capsys):
    options = ["--min-channels", "8,16,auto", "--latent-channels", "4", "--against", "composer"]
    files = ["--json", "cost.json", "--plot", "cost.svg"]
    assert main(["cost", "my_networks:tiny", *options, *files, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    for word in (
        "plain",
        "ours 8",
        "built-in 16",
        "auto (16)",
        "passes",
        "training step",
        "batch 1",
        "batch 2",
        "CPUs",
    ):
        assert word in printed
    assert "…" not in printed

    found = json.loads(Path("cost.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [
        *("plain", "ours 8", "built-in 8", "ours 16", "built-in 16", "ours auto (16)", "built-in auto (16)"),
    ]
    assert [len(row["layers"]) for row in rows.values()] == [0, 2, 2, 1, 1, 1, 1]
    assert rows["ours 8"]["parameters"] - rows["plain"]["parameters"] == 2 * 4 * (8 + 16)
    assert set(rows["built-in 8"]["passes"]) == {13}
    assert set(rows["ours 8"]["passes"]) == {6}
    saved = {name: row["saved_bytes"] for name, row in rows.items()}
    # 2 images of 8 channels at 8 x 8, and of 16 at 4 x 4, in 4 bytes each; ours keeps numbers per map instead.
    maps = 2 * 4 * (8 * 8 * 8 + 16 * 4 * 4)
    assert 0.7 * maps < saved["built-in 8"] - saved["ours 8"] < maps
    assert set(found["seconds"]) == {"training step", "inference, batch 1", "inference, batch 2"}
    for row in found["rows"]:
        assert all(time["milliseconds"] > 0 for time in row["times"].values())
    assert [entry["min_channels"] for entry in found["against_composer"]] == ["8", "16", "auto (16)"]
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert {"latent_channels": 4, "min_channels_of": "output"}.items() <= found["settings"]["squeeze_excite"].items()
    assert ET.parse("cost.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_networks:tiny", "--layers", "--min-channels", "8,16"], "--layers: measures the layers of one setting"),
        ([], "name one network"),
        (["my_networks:tiny", "--model", "resnet18"], "name one network"),
        (["tiny"], "package.module:factory"),
        (["nowhere:tiny"], "can't be imported"),
        (["my_networks:huge"], "no function or class 'huge'"),
        (["my_networks:number"], "no function or class 'number'"),
        (["my_networks:broken"], "out of order"),
        (["my_networks:no_network"], "returned a int"),
        (["--model", "resnet81"], "resnet18"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
        (["my_networks:tiny", "--min-channels", "8,many"], "'many'"),
        (["my_networks:tiny", "--min-channels", "1000"], "fits no conv"),
        (["my_networks:tiny", "--latent-channels", "0"], "--latent-channels 0"),
        (["my_networks:tiny", "--latent-channels", "1.5"], "--latent-channels 1.5"),
        (["my_networks:tiny", "--latent-channels", "nan"], "--latent-channels nan"),
        (["my_networks:tiny", "--min-channels", "8,3.5"], "--min-channels 3.5"),
        (["my_networks:tiny", "--min-channels", "8,"], "--min-channels : min_channels is ''"),
        (["my_networks:tiny", "--min-channels-of", "both", "--json", "x" * 300], "too long"),
        (["my_networks:tiny", "--instances", "1"], "at least 2"),
        (["my_networks:tiny", "--device", "abacus"], "--device abacus"),
        (["my_networks:tiny", "--json", "no/folder/x.json"], "--json no/folder/x.json"),
        (["my_networks:tiny", "--plot", "cost.doc"], "--plot cost.doc"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["cost", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_full_disk_after_the_measurement_is_one_line_below_the_tables(option, capsys):
    Path("full.svg").symlink_to("/dev/full")
    assert main(["cost", "my_networks:tiny", "--min-channels", "8", option, "full.svg", *SMALL]) == 2
    printed = capsys.readouterr()
    assert "training step" in printed.out
    assert (
        printed.err.strip() == f"composer-se cost: error: {option} full.svg: can't be written: No space left on device"
    )


def test_layers_alone_are_a_table_for_each_mode_and_stand_in_the_json(capsys):
    options = [
        "--min-channels",
        "8",
        "--latent-channels",
        "4",
        "--against",
        "composer",
        "--layers",
        "--json",
        "cost.json",
    ]
    assert main(["cost", "my_networks:tiny", *options, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    for word in ("Layer by layer, training", "Layer by layer, inference, batch 1", "8×8×8", "16×4×4", "ours over the"):
        assert word in printed
    layers = json.loads(Path("cost.json").read_text())["layers"]
    assert [(kind["channels"], kind["count"]) for kind in layers["kinds"]] == [(8, 1), (16, 1)]
    assert list(layers["modes"]) == ["training", "inference, batch 1", "inference, batch 2"]
    for mode in layers["modes"].values():
        assert list(mode["milliseconds"]) == ["norm", "composer-se", "composer"]
        assert {"value", "low", "high"} <= mode["share"].keys()


def test_what_fails_before_the_measurement_leaves_the_files_as_they_were(capsys):
    Path("old.json").write_text("old")
    files = ["--json", "old.json", "--plot", "new.svg"]
    assert main(["cost", "my_networks:broken", *files, *SMALL]) == 2
    assert Path("old.json").read_text() == "old"
    assert not Path("new.svg").exists()


def test_whole_numbers_written_as_fractions_are_widths_as_in_the_library(capsys):
    options = ["--min-channels", "8.0,8", "--latent-channels", "4.0", "--json", "c.json"]
    assert main(["cost", "my_networks:tiny", *options, *SMALL]) == 0
    rows = json.loads(Path("c.json").read_text())["rows"]
    assert [row["min_channels"] for row in rows] == [None, "8"]
    assert rows[1]["parameters"] - rows[0]["parameters"] == 2 * 4 * (8 + 16)


def test_a_recipes_images_are_measured_in_their_own_size(capsys):
    Path("digits.yaml").write_text(RECIPE.replace("synthetic", "digits"))
    few = ["--batch-size", "2", "--device", "cpu", "--repeats", "1", "--instances", "2"]
    assert main(["cost", "--recipe", "digits.yaml", "--json", "c.json", *few]) == 0
    assert json.loads(Path("c.json").read_text())["settings"]["image_size"] == 8
    assert named("--recipe", "recipe.yaml").image_size == 224
    assert named("my_networks:tiny").image_size is None


def test_a_network_that_takes_no_such_images_is_reported_in_one_line(capsys):
    Path("picky.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(3, 8, 9), nn.Flatten())"
    )
    assert main(["cost", "picky:net", "--min-channels", "8", *SMALL]) == 2
    assert "does not train on a batch of 2 x 3 x 8 x 8 images" in capsys.readouterr().err


def named(*arguments: str):
    parser = argparse.ArgumentParser()
    add_network_arguments(parser)
    return read_network(parser.parse_args(arguments))


def test_a_network_is_built_with_the_same_weights_each_time():
    network = named("my_networks:tiny")
    first, second = network.build(), network.build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first is not second


def test_a_recipe_gives_its_network_and_its_settings_of_squeeze_excite():
    network = named("--recipe", "recipe.yaml")
    convs = [module for module in network.build().modules() if isinstance(module, nn.Conv2d)]
    assert convs[0].in_channels == 1
    assert network.squeeze_excite == SqueezeExciteOptions(5, 32, "both")


def test_a_recipes_settings_are_what_is_measured_unless_an_option_says_otherwise(capsys):
    assert main(["cost", "--recipe", "recipe.yaml", "--latent-channels", "6", "--json", "c.json", *SMALL]) == 0
    found = json.loads(Path("c.json").read_text())
    assert [row["min_channels"] for row in found["rows"]] == [None, "32"]
    assert {"latent_channels": 6, "min_channels_of": "both"}.items() <= found["settings"]["squeeze_excite"].items()


def test_a_model_by_name():
    assert sum(p.numel() for p in named("--model", "resnet18").build().parameters()) == 11689512
    with pytest.raises(UserError, match="resnet18"):
        named("--model", "resnet81").build()
