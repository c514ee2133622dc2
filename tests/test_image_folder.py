"""Images of the user's own: classes from folders, a split that stays, and a run from its start to its report."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_runs import final_state, train, train_until
from torch import nn

from composer_se.cli import main
from composer_se.commands.network import add_network_arguments, read_network
from composer_se.errors import UserError
from composer_se.parts.image_sets import image_folder
from composer_se.parts.loaders import SeededImages
from composer_se.recipe.load import load_recipe
from composer_se.recipe.run_folder import check_classes, write_classes, write_recipe, write_summary
from composer_se.recipe.validate import make_plan

NETWORK = """
from torch import nn

def make_network(num_classes: int):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""

RECIPE = """
model: {name: my_package.models:make_network}
train_dataset: {name: image_folder, root: photos, image_size: 24, num_workers: 1}
eval_dataset: {name: image_folder, root: photos, image_size: 24, num_workers: 0}
optimizer: {name: sgd, lr: 0.05}
algorithms:
  squeeze_excite: {min_channels: 1, latent_channels: 4}
max_duration: 1ep
train_batch_size: 4
save_interval: 2ba
device: cpu
progress_bar: false
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, a network and photos of three classes, in the current folder."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "models.py").write_text(NETWORK)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    add_photos(tmp_path / "photos", cat=12, dog=9, owl=14)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_package", "my_package.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def add_photos(root: Path, **counts: int) -> None:
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(60 * label, 60 * label + 120, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:03}.jpg")


def files(train: bool, **arguments: object) -> set[str]:
    subset = image_folder(train, "photos", **arguments).images  # type: ignore[arg-type]
    return {Path(subset.dataset.samples[index][0]).relative_to("photos").as_posix() for index in subset.indices}


@pytest.mark.usefixtures("folder")
def test_a_folder_without_train_and_val_is_split_in_proportion_and_always_alike() -> None:
    kept, held_out = files(True), files(False)
    everything = {path.relative_to("photos").as_posix() for path in Path("photos").glob("*/*.jpg")}
    assert kept | held_out == everything
    assert not kept & held_out
    for seed in range(5):
        classes = Counter(name.partition("/")[0] for name in files(False, split_seed=seed))
        assert classes == {"cat": 2, "dog": 2, "owl": 3}
    assert files(False) == held_out
    assert files(False, split_seed=1) != held_out
    assert len(files(False, val_fraction=0.5)) == 17
    for wrong in ({"val_fraction": 0.0}, {"val_fraction": 1.0}, {"val_fraction": 0.01}, {"split_seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            files(True, **wrong)


@pytest.mark.usefixtures("folder")
def test_images_are_imagenets_crops_and_classes_are_numbered_by_name() -> None:
    Path("photos", ".thumbnails").mkdir()
    for is_train in (True, False):
        split = image_folder(is_train, "photos", image_size=16)
        items = SeededImages(split.images, split.transform, seed=0)
        assert split.classes == ["cat", "dog", "owl"]
        assert items[0][0].shape == (3, 16, 16)
        assert {items[index][1] for index in range(len(items))} == {0, 1, 2}


@pytest.mark.usefixtures("folder")
def test_train_and_val_are_taken_where_they_are() -> None:
    add_photos(Path("divided/train"), cat=3, dog=2)
    add_photos(Path("divided/val"), cat=1, dog=1)
    splits = [image_folder(is_train, "divided") for is_train in (True, False)]
    assert [len(split.images) for split in splits] == [5, 2]  # type: ignore[arg-type]


def outputs(*overrides: str) -> int:
    network = make_plan(load_recipe("mine.yaml", overrides)).model.build()
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1].out_features


@pytest.mark.usefixtures("folder")
def test_the_number_of_outputs_is_that_of_the_classes_unless_it_is_given() -> None:
    assert outputs() == 3
    assert outputs("model.num_classes=5") == 5
    assert outputs("model={name: resnet18}") == 3
    digits = ("train_dataset={name: digits}", "eval_dataset=null")
    assert outputs("model={name: resnet18}", *digits) == 10
    assert outputs("model={name: resnet18}", "train_dataset={name: synthetic, num_classes: 7}") == 7


@pytest.mark.usefixtures("folder")
def test_plan_cost_and_report_take_the_same_network() -> None:
    parser = argparse.ArgumentParser()
    add_network_arguments(parser)
    network = read_network(parser.parse_args(["--recipe", "mine.yaml"]))
    assert network.image_size == 24
    built = network.build()
    assert built[-1].out_features == 3  # type: ignore[index]
    assert all(map(torch.equal, built.parameters(), network.build().parameters()))
    assert main(["plan", "--recipe", "mine.yaml"]) == 0


def test_bad_trees_are_refused_in_one_line_and_nothing_is_written(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    add_photos(Path("one"), cat=2)
    Path("none").mkdir()
    for name in ("empty/cat", "empty/dog", "half/train/cat", "half/train/dog"):
        Path(name).mkdir(parents=True)
    add_photos(Path("empty"), cat=2)
    add_photos(Path("half/train"), cat=1, dog=1)
    add_photos(Path("odd/train"), cat=1, dog=1)
    add_photos(Path("odd/val"), cat=1, owl=1)
    for root, message in (
        ("nowhere", "found no folder 'nowhere/train' and 'nowhere/val'; put one folder of images per class there, or"),
        ("none", "'none' holds no folder of images; expected two classes or more"),
        ("one", "'one' holds one class, 'cat'; expected two classes or more"),
        ("empty", "'empty/dog' holds no image (.jpg, .jpeg, .png"),
        ("half", "found no folder 'half/val'; put one folder of images per class there"),
        ("odd", "'odd/train' and 'odd/val' differ: 'dog' is a class in one of them only"),
    ):
        data = [f"train_dataset.root={root}", f"eval_dataset.root={root}"]
        assert main(["train", "mine.yaml", "model.num_classes=2", *data]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"_dataset.root: {message}" in line, line
    for overrides, message in (
        (["model.num_classes=2"], "model.num_classes: my_package.models:make_network has 2 outputs, but train_dataset"),
        (
            ["train_dataset.val_fraction=0.3", "train_dataset.root=./photos/"],
            "eval_dataset.val_fraction: is 0.2, but 0.3 in train_dataset",
        ),
        (["train_dataset.root=null"], "train_dataset.root: expected a string, got None"),
        (["train_dataset={name: image_folder}"], "train_dataset.root: required by image_folder"),
        (["train_dataset.val_fraction=2", "eval_dataset=null"], "train_dataset.val_fraction: val_fraction must be abo"),
        (["train_dataset.image_size=0"], "train_dataset.image_size: image_size must be 1 or more, got 0"),
    ):
        assert main(["train", "mine.yaml", *overrides]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert message in line, line
    assert not (folder / "runs").exists()


@pytest.mark.usefixtures("folder")
def test_a_tree_that_may_not_be_read_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("composer_se.parts.image_tree.os.scandir", forbidden)
    assert main(["train", "mine.yaml", "model.num_classes=3"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "train_dataset.root: can't be read ([Errno 13] Permission denied: 'photos')" in line


@pytest.mark.usefixtures("folder")
def test_an_image_that_can_not_be_decoded_ends_the_run_with_its_path(capfd: pytest.CaptureFixture[str]) -> None:
    for path in Path("photos").glob("cat/*.jpg"):
        if path.name > "000.jpg":
            path.write_bytes(path.read_bytes()[:200])
    assert main(["train", "mine.yaml"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "error: photos/cat/0" in last
    assert "can't be read" in last


def test_a_run_is_not_continued_with_other_classes(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    del folder
    recipe = load_recipe("mine.yaml")
    check_classes(recipe, ["ant", "bee"])
    write_recipe(recipe)
    write_classes(recipe, ["ant", "bee", "cat"])
    check_classes(recipe, ["ant", "bee"])  # nothing was saved yet
    write_summary(recipe, {"max_duration": "2ep", "epoch": 0, "batch": 0, "sample": 0})
    check_classes(recipe, ["ant", "bee", "cat"])
    check_classes(recipe, None)
    assert main(["train", "mine.yaml"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "train_dataset: its classes are not those that the run in runs/mine began with ('ant' is in one" in line


@pytest.mark.launch
def test_photos_train_a_network_of_ones_own_killed_resumed_and_looked_at(folder: Path) -> None:
    add_photos(folder / "photos", cat=60, dog=45, owl=70)
    options = ["mine.yaml", "save_interval=4ba"]
    train_until(folder, 6, signal.SIGKILL, *options, run_name="mine")
    assert not (folder / "runs/mine/summary.json").exists()
    done = train(folder, *options)
    assert done.returncode == 0, done.stderr
    assert "continuing runs/mine from its checkpoint of epoch 0, batch" in done.stderr
    assert main(["train", *options, "run_name=at_once"]) == 0
    torch.testing.assert_close(final_state(folder, "mine")["model"], final_state(folder, "at_once")["model"])
    assert "Classes: cat, dog, owl" in (folder / "runs/mine/report.html").read_text()
    (folder / "photos").rename(folder / "moved")  # the run knows its classes without its images
    shutil.copytree(folder / "moved", folder / "held/val")  # no images to train on
    assert main(["gates", "runs/mine", "--data", "image_folder:held"]) == 0
    assert main(["gates", "runs/mine", "--data", "image_folder:moved"]) == 0
    layer = json.loads((folder / "runs/mine/gates/gates.json").read_text())["layers"][0]
    assert list(layer["by_class"]) == ["cat", "dog", "owl"]
    page = (folder / "runs/mine/report.html").read_text()
    assert "Gates after training" in page
    assert "Classes: cat, dog, owl" in page


@pytest.mark.parametrize(("pixels", "words"), [(np.uint16, "more than 8 bits"), (np.uint8, "decompression bomb")])
def test_an_image_of_more_than_8_bits_or_far_too_large_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: type, words: str
) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.fromarray(np.full((20, 20), 200, pixels)).save(tmp_path / name / f"{number}.png")
    if pixels is np.uint8:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=words):
        image_folder(True, str(tmp_path)).example()
