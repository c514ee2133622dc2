"""`composer-se slim`: the blocks that go are those that cost least, and what is left is an ordinary network."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from recipe_runs import environment
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations
from torch.utils.data import DataLoader, TensorDataset
from two_process_gates import small_network

from composer_se import apply_squeeze_excite, fold_constant_gates
from composer_se.cli import main
from composer_se.commands.trained_network import load_trained
from composer_se.errors import UserError
from composer_se.measure import timing
from composer_se.measure.uncertainty import change_of_share
from composer_se.parts.models import build_network
from composer_se.recipe.load import load_recipe
from composer_se.slim import latency, search
from composer_se.slim.images import halves
from composer_se.slim.output import slim_recipe
from composer_se.slim.search import Point, Score, find_curve, fold_first, mean_gates, most_fixed
from composer_se.wrapper import SqueezeExcited

Batches = list[tuple[Tensor, Tensor]]
FILES = ["recipe.yaml", "slim.json", "slim.png", "weights.pt"]
CPU = torch.device("cpu")
BLOCKS = [f"stage3.{block}.conv{conv}" for block in range(3) for conv in (1, 2)]


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


@torch.no_grad()
def loss_and_accuracy(network: nn.Module, batches: Batches) -> tuple[float, float]:
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    outputs = network(images)
    loss = nn.functional.cross_entropy(outputs, labels)
    return float(loss), float((outputs.argmax(1) == labels).double().mean())


def test_mean_gates_are_those_of_all_images(network: nn.Sequential, batches: Batches) -> None:
    means, reasons = mean_gates(network, batches)
    wrapper = network[0]
    w1, w2 = wrapper.se.parameters()
    with torch.no_grad():
        squeezed = torch.cat([wrapper.conv(images).mean((2, 3)) for images, _ in batches])
        gates = torch.sigmoid(torch.relu(squeezed @ w1.T) @ w2.T)
    torch.testing.assert_close(means["0"], gates.double().mean(0), atol=1e-6, rtol=0)
    assert list(means) == ["0", "3"]
    assert reasons == {}
    assert not any(module._forward_hooks for module in network.modules())


def test_least_costly_block_goes_first_and_each_point_is_the_folded_network(
    network: nn.Sequential, batches: Batches
) -> None:
    means, _ = mean_gates(network, batches)
    before = copy.deepcopy(network.state_dict())
    points = find_curve(network, means, batches, batches[:1])
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    single = {}
    for name in means:
        folded = fold_first(network, means, [points[0], Point(name, 0, points[0].deciding, points[0].reporting)], 1)
        single[name] = loss_and_accuracy(folded, batches)[0]
    assert [point.fixed for point in points] == [None, *sorted(single, key=single.__getitem__)]
    for count, point in enumerate(points):
        folded = fold_first(network, means, points, count)
        assert sum(isinstance(module, SqueezeExcited) for module in folded.modules()) == 2 - count
        assert point.parameters == sum(parameter.numel() for parameter in folded.parameters())
        assert point.deciding.accuracy == pytest.approx(loss_and_accuracy(folded, batches)[1])
        accuracy = loss_and_accuracy(folded, batches[:1])[1]
        assert point.reporting.accuracy == pytest.approx(accuracy)
        assert point.reporting.change.value == pytest.approx(accuracy - points[0].reporting.accuracy)


def test_block_that_can_not_be_folded_stays(network: nn.Sequential, batches: Batches) -> None:
    parametrizations.weight_norm(network[0].conv)
    means, reasons = mean_gates(network, batches)
    assert list(means) == ["3"]
    assert "without a plain weight" in reasons["0"]


def test_fewest_blocks_within_the_tolerance_stay() -> None:
    def point(lost: int) -> Point:
        score = Score(0.9, change_of_share(lost, 0, 1000))
        return Point("", 0, score, score)

    points = [point(lost) for lost in (0, 2, 1, 3)]
    assert [most_fixed(points, tolerance) for tolerance in (0, 0.1, 0.2, 0.3)] == [0, 2, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_halves_are_always_the_same_and_share_no_image(workers: int) -> None:
    images = TensorDataset(torch.arange(9.0).view(9, 1, 1, 1), torch.arange(9))
    first, second = (halves(DataLoader(images, 2, num_workers=workers)) for _ in range(2))
    labels = [[int(label) for _, labels in batches for label in labels] for batches, _ in first]
    assert [len(of_half) for of_half in labels] == [number for _, number in first] == [4, 5]
    assert sorted(labels[0] + labels[1]) == list(range(9))
    assert labels == [[int(label) for _, labels in batches for label in labels] for batches, _ in second]
    with pytest.raises(UserError, match="expected two held-out images at least"):
        halves(DataLoader(TensorDataset(torch.zeros(1, 1), torch.zeros(1))))


# ---- the command


def slim(run: Path, *options: str) -> int:
    """The command with little timing, where four of six blocks can go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "ROUNDS", 2)
        patch.setattr(timing, "MOST_STEPS", 3)
        patch.setattr(search, "most_fixed", lambda points, tolerance: 4)
        return main(["slim", str(run), "--device", "cpu", *options])


@dataclass(frozen=True)
class Slimmed:
    run: Path
    folder: Path
    output: str


def slimmed(run: Path, folder: Path) -> Slimmed:
    before = checksums(run)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert slim(run, "--out", str(folder)) == 0
    assert checksums(run) == before
    return Slimmed(run, folder, output.getvalue())


@pytest.fixture(scope="module")
def after_convs(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Slimmed:
    return slimmed(digits_run, tmp_path_factory.mktemp("convs") / "out")


@pytest.fixture(scope="module")
def after_norms(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Slimmed:
    """Of weights whose blocks have started at identity, after norms."""
    run = tmp_path_factory.mktemp("norms")
    shutil.copy(digits_run / "recipe.yaml", run)
    options = {"latent_channels": 64, "min_channels": 64, "placement": "norm", "init": "identity"}
    change_recipe(run, "algorithms", {"squeeze_excite": options})
    network = build_network("cifar_resnet20", in_channels=1)
    for wrapper in apply_squeeze_excite(network, **options).values():
        nn.init.normal_(wrapper.se.pool_and_mlp["4"].weight)
    torch.save(network.state_dict(), run / "weights.pt")
    return slimmed(run, tmp_path_factory.mktemp("norms") / "out")


def checksums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def reloaded(after_convs: Slimmed) -> nn.Module:
    return load_trained(after_convs.folder, None, None, torch.device("cpu")).network


@pytest.mark.parametrize("placement", ["after_convs", "after_norms"])
def test_what_is_written_is_the_folded_network(placement: str, request: pytest.FixtureRequest) -> None:
    slimmed: Slimmed = request.getfixturevalue(placement)
    assert sorted(path.name for path in slimmed.folder.iterdir()) == FILES
    found = json.loads((slimmed.folder / "slim.json").read_text())
    names = [point["fixed"] for point in found["points"]]
    layers = BLOCKS if placement == "after_convs" else [name.replace("conv", "bn") for name in BLOCKS]
    assert sorted(names[1:]) == layers
    trained, network = load_trained(slimmed.run, None, None, CPU), load_trained(slimmed.folder, None, None, CPU).network
    assert {name for name, module in network.named_modules() if isinstance(module, SqueezeExcited)} == {*names[5:]}
    (deciding, _), (reporting, _) = halves(trained.batches)
    means, _ = mean_gates(trained.network, deciding)
    expected = copy.deepcopy(trained.network)
    fold_constant_gates(expected, {name: means[name] for name in names[1:5]})
    images, _ = next(iter(reporting))
    assert torch.equal(network(images), expected(images))
    accuracy = loss_and_accuracy(network, list(reporting))[1]
    assert found["points"][4]["reporting"]["accuracy"] == pytest.approx(accuracy)


def test_command_says_what_was_gained(after_norms: Slimmed) -> None:
    found = json.loads((after_norms.folder / "slim.json").read_text())
    assert found["num_images"] == {"deciding": 180, "reporting": 180}
    assert found["latency"].keys() == {"1", "16"}
    assert all({"0", "4", "6"} <= by_count.keys() for by_count in found["latency"].values())
    said = ("keeps 2 of 6 blocks", "parameters", "latency, batch 16", "180 held-out images that decided nothing")
    assert all(words in " ".join(after_norms.output.split()) for words in said)
    assert max(map(len, after_norms.output.split("Written:")[0].splitlines())) <= 80


def test_network_without_any_block_left_has_no_algorithm(digits_run: Path) -> None:
    recipe = load_recipe(str(digits_run / "recipe.yaml"))
    algorithms = slim_recipe(recipe, build_network("cifar_resnet20"), Path("out")).algorithms
    assert algorithms is not None
    assert "squeeze_excite" not in algorithms
    assert recipe.algorithms is not None
    assert "squeeze_excite" in recipe.algorithms


def test_what_is_written_exports_and_its_norms_fold_again(after_convs: Slimmed) -> None:
    network = load_trained(after_convs.folder, None, None, CPU).network
    images = torch.randn(2, 1, 8, 8)
    exported = torch.export.export(network, (images,)).module()
    torch.testing.assert_close(exported(images), network(images))
    expected = network(images)
    bare = network.get_submodule("stage1.0")
    bare.conv1, bare.bn1 = fuse_conv_bn_eval(bare.conv1, bare.bn1), nn.Identity()
    torch.testing.assert_close(network(images), expected)


def test_what_is_written_trains_on_and_is_looked_at(
    after_convs: Slimmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    still = ["max_duration=1ba", "optimizer.lr=0", "optimizer.weight_decay=0", "scheduler=null", "eval_dataset=null"]
    folder = [f"run_folder={tmp_path / 'on'}", f"save_folder={tmp_path / 'on' / 'checkpoints'}"]
    assert main(["train", str(after_convs.folder / "recipe.yaml"), *still, *folder]) == 0
    state = torch.load(tmp_path / "on" / "checkpoints" / "latest-rank0.pt", weights_only=False)["state"]["model"]
    weights = torch.load(after_convs.folder / "weights.pt")
    assert {name.removeprefix("module.") for name in state} == weights.keys()
    assert torch.equal(state["module.fc.weight"], weights["fc.weight"])
    assert main(["gates", str(after_convs.folder), "--out", str(tmp_path)]) == 0


@pytest.mark.launch
def test_killed_and_started_again_it_ends_with_the_same_result(
    digits_run: Path, after_convs: Slimmed, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(digits_run, tmp_path / "digits", symlinks=True))
    command = [sys.executable, "-m", "composer_se.cli", "slim", str(run), "--device", "cpu"]
    with (tmp_path / "progress.txt").open("w") as output:
        process = subprocess.Popen(command, env=environment(), stderr=output)
    deadline = time.monotonic() + 200
    while "fixing one block" not in (tmp_path / "progress.txt").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert checksums(run) == checksums(digits_run)
    assert slim(run) == 0
    assert (run / "slim" / "weights.pt").read_bytes() == (after_convs.folder / "weights.pt").read_bytes()
    again, before = (json.loads((folder / "slim.json").read_text()) for folder in (run / "slim", after_convs.folder))
    assert again["points"] == before["points"]


def damage(run: Path) -> None:
    checkpoint = (run / "checkpoints" / "latest-rank0.pt").resolve()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])


def without_se(run: Path) -> None:
    change_recipe(run, "algorithms", {})
    shutil.rmtree(run / "checkpoints")
    torch.save(build_network("cifar_resnet20", in_channels=1).state_dict(), run / "weights.pt")


def without_images(run: Path) -> None:
    change_recipe(run, "eval_dataset", None)


def change_recipe(run: Path, key: str, value: object) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {key: value}))


MISTAKES = {
    "no SE": (without_se, "0.1", "the network has no Squeeze-and-Excitation layers"),
    "negative tolerance": (None, "-1", "--tolerance -1: expected percentage points"),
    "no number": (None, "nan", "--tolerance nan: expected percentage points"),
    "no images": (without_images, "0.1", "the recipe has no eval_dataset; name held-out data with --data"),
    "damaged checkpoint": (damage, "0.1", "the latest checkpoint is damaged"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_in_one_line_and_nothing_is_written(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    spoil, tolerance, words = MISTAKES[mistake]
    run = Path(shutil.copytree(digits_run, tmp_path / "digits", symlinks=True))
    if spoil:
        spoil(run)
    before = checksums(run)
    assert main(["slim", str(run), "--tolerance", tolerance]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.strip().count("\n") == 0
    assert checksums(run) == before


def test_the_run_itself_is_never_overwritten(digits_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = checksums(digits_run)
    assert main(["slim", str(digits_run), "--out", str(digits_run)]) == 2
    assert "is the run's own folder" in capsys.readouterr().err
    assert checksums(digits_run) == before
