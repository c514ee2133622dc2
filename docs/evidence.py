"""The studies behind `does-it-pay.md`. Each is continued by its command, which trains only what is missing.

    make finetuning    what to train when a pretrained network gets another task
    make placement     where SE sits in a network that is trained from scratch, and what `slim` makes of it

Both train on 10,000 images of Fashion-MNIST, always the same, and judge on the 10,000 test images. Learning rates and
epochs are chosen on other training images.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

RESULTS = Path(os.path.relpath(Path(__file__).parent / "results"))  # results name their folder
RUNS = Path("runs")
NO_SE = "algorithms.squeeze_excite=null"
ALL_CONVS = "algorithms.squeeze_excite.min_channels=1"
NUM_SAMPLES = 10_000
TRAINED_ON = f"train_dataset.num_samples={NUM_SAMPLES}"

FINETUNING = "finetune_fashion_mnist"
FINETUNING_ARMS = {
    "head": (NO_SE, "trainable=[head]"),
    "norms, head": (NO_SE, "trainable=[norms, head]"),
    "SE, head": (),
    "SE, norms, head": ("trainable=[se, norms, head]",),
    "random SE, head": ("algorithms.squeeze_excite.init=default",),
    "everything": (NO_SE, "trainable=null"),
    "everything, SE": ("trainable=null",),
}
FINETUNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

PLACEMENT = "fashion_mnist_resnet8"
PLACEMENT_ARMS = {
    "no SE": (NO_SE,),
    "last stage": (),
    "all convs": (ALL_CONVS,),
    "end of each branch": (
        ALL_CONVS,
        "algorithms.squeeze_excite.include='*.conv2'",
        "algorithms.squeeze_excite.placement=norm",
    ),
    "built-in, all convs": (NO_SE, "algorithms.composer_squeeze_excite={latent_channels: 64, min_channels: 1}"),
}
IDENTITY = "algorithms.squeeze_excite.init=identity"
IDENTITY_ARMS = {  # added once the others were judged: did gates that start at one half cost the accuracy?
    "all convs, identity": (*PLACEMENT_ARMS["all convs"], IDENTITY),
    "end of each branch, identity": (*PLACEMENT_ARMS["end of each branch"], IDENTITY),
}
PLACEMENT_RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
PLACEMENT_EPOCHS = (5, 10, 20, 40)
ENOUGH = 0.002  # a doubling of the epochs that brings less ends their search
POINTS = "0.2"  # percentage points that the seeds of the placement study should decide


def held_out_training_images(
    train: bool, root: str, num_held_out: int, image_size: int = 28, num_channels: Literal[1, 3] = 1
) -> Dataset:
    """Training images of Fashion-MNIST that `num_samples` leaves out, prepared like test images."""
    from composer_se.parts.image_sets import fashion_mnist
    from composer_se.parts.loaders import SeededImages

    del train
    images: Any = fashion_mnist(True, root).images
    order = np.random.RandomState(0).permutation(len(images))  # that of `num_samples`, which takes the first ones
    transform = fashion_mnist(False, root, image_size=image_size, num_channels=num_channels).transform
    return SeededImages(Subset(images, order[-num_held_out:].tolist()), transform, seed=0)


class Chosen:
    """The accuracies on held-out training images that learning rates and epochs were chosen by, kept in a file."""

    def __init__(self, path: Path, recipe: str, shared: Sequence[str]) -> None:
        self.path = path
        self.recipe = recipe
        self.shared = shared
        self.found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def accuracy(self, group: str, value: str, *overrides: str) -> float:
        """What the recipe reaches with overrides: read, or trained."""
        accuracies = self.found.setdefault(group, {})
        if value not in accuracies:
            words = f"{group}-{value}".replace(",", "").replace(" ", "-")
            run = RUNS / "chosen" / self.path.parent.name / words
            place = (f"run_folder={run}", f"save_folder={run}/checkpoints", "progress_bar=false")
            composer_se("train", self.recipe, *self.shared, *overrides, *place)
            summary = json.loads((run / "summary.json").read_text())
            accuracies[value] = summary["metrics"]["metrics/eval/MulticlassAccuracy"]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        return accuracies[value]

    def learning_rate(self, group: str, rates: Sequence[float], start: float, *overrides: str) -> float:
        """The best learning rate of a grid, searched from one on until it has a worse one on either side."""
        best, before = rates.index(start), None
        while best != before:
            before = best
            near = range(max(0, best - 1), min(best + 2, len(rates)))
            best = max(near, key=lambda i: self.accuracy(group, str(rates[i]), *overrides, f"optimizer.lr={rates[i]}"))
        return rates[best]


def finetuning(root: str, seeds: int) -> None:
    """Every arm with the learning rate that suits it: one epoch of 5,000 images, judged on 2,000 others."""
    folder = RESULTS / "finetuning"
    held_out = f"eval_dataset={{name: 'evidence:held_out_training_images', root: {root}, num_held_out: 2000, "
    held_out += "image_size: 64, num_channels: 3}"
    shared = (f"train_dataset.root={root}", "train_dataset.num_samples=5000", held_out)
    chosen = Chosen(folder / "chosen.json", FINETUNING, shared)
    rates = {arm: chosen.learning_rate(arm, FINETUNING_RATES, 1e-3, *FINETUNING_ARMS[arm]) for arm in FINETUNING_ARMS}
    arms = {arm: (*overrides, f"optimizer.lr={rates[arm]}") for arm, overrides in FINETUNING_ARMS.items()}
    count_steps(folder / "steps.json", arms, root)
    compare_statistics(folder / "statistics.json", root)
    compare(FINETUNING, arms, root, folder, "--seeds", str(seeds))


def count_steps(path: Path, arms: dict[str, tuple[str, ...]], root: str) -> None:
    """Counts the parameters that each arm trains, and the bytes that one of its steps saves for the backward pass."""
    from composer_se.cost.counts import saved_bytes
    from composer_se.measure.steps import loss_of
    from composer_se.recipe.load import load_recipe
    from composer_se.recipe.trainer import build_parts, end_trainer, make_trainer
    from composer_se.recipe.validate import make_plan

    if path.is_file():
        return
    counts = {}
    for arm, overrides in arms.items():
        recipe = load_recipe(FINETUNING, (f"train_dataset.root={root}", TRAINED_ON, *overrides))
        parts = build_parts(recipe, make_plan(recipe))
        trainer = make_trainer(parts, max_duration=recipe.max_duration, progress_bar=False)
        network = parts.network.train()
        assert parts.train_loader is not None
        images, labels = next(iter(parts.train_loader))
        kept = (*network.parameters(), *network.buffers())
        counts[arm] = {
            "trained_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
            "saved_bytes": saved_bytes(lambda run=network, x=images, y=labels: loss_of(run(x), y), kept),
        }
        end_trainer(trainer)
    path.write_text(json.dumps(counts, indent=1) + "\n")


def compare_statistics(path: Path, root: str) -> None:
    """How good the pretrained features are with the norms' statistics of ImageNet, and with those of Fashion-MNIST.

    Judged by a linear classifier of 5,000 training images on 2,000 others.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from composer_se.parts.models import build_network

    if path.is_file():
        return
    network: Any = build_network("efficientnet_lite0", weights="IMAGENET", num_classes=10).eval()
    network.reset_classifier(0)
    held_out = held_out_training_images(True, root, 7000, image_size=64, num_channels=3)
    images, labels = next(iter(DataLoader(held_out, batch_size=7000)))

    @torch.no_grad()
    def accuracy() -> float:
        features = torch.cat([network.eval()(batch) for batch in images.split(100)]).numpy()
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        return float(classifier.fit(features[:5000], labels[:5000]).score(features[5000:], labels[5000:]))

    found = {"ImageNet": accuracy()}
    with torch.no_grad():
        for batch in images[:5000].split(100):
            network.train()(batch)
    found["Fashion-MNIST"] = accuracy()
    path.write_text(json.dumps(found, indent=1) + "\n")


def placement(root: str, seeds: int) -> None:
    """Every arm with the learning rate and epochs that suit the network without SE, then `slim` on "all convs"."""
    folder = RESULTS / "placement"
    held_out = f"eval_dataset={{name: 'evidence:held_out_training_images', root: {root}, num_held_out: 10000}}"
    shared = (f"train_dataset.root={root}", TRAINED_ON, held_out, NO_SE, "eval_interval=100ep")  # at the end only
    chosen = Chosen(folder / "chosen.json", PLACEMENT, shared)
    rate = chosen.learning_rate("learning rate", PLACEMENT_RATES, 0.2, "max_duration=10ep")

    def after(epochs: int) -> float:
        overrides = (f"optimizer.lr={rate}", f"max_duration={epochs}ep")
        return mean(chosen.accuracy("epochs", f"{epochs}, seed {s}", *overrides, f"seed={s}") for s in (1, 2, 3))

    epochs = next(e for e in PLACEMENT_EPOCHS if 2 * e not in PLACEMENT_EPOCHS or after(2 * e) - after(e) < ENOUGH)
    overrides = (f"optimizer.lr={rate}", f"max_duration={epochs}ep", f"eval_interval={epochs // 5}ep")
    compare(PLACEMENT, PLACEMENT_ARMS, root, folder, "--pilot", POINTS, *overrides)
    compare(PLACEMENT, PLACEMENT_ARMS | IDENTITY_ARMS, root, folder, "--seeds", str(seeds), *overrides)
    for seed in range(17, 17 + seeds):
        run = folder / "runs" / f"all-convs-seed{seed}"
        slimmed = folder / "slim" / f"{run.name}.json"
        if not slimmed.is_file():
            if not run.is_dir():
                outcome = folder / "outcomes" / f"{run.name}.json"
                sys.exit(
                    f"{run} is gone, so it can't be slimmed: delete {outcome}, and the same command trains it anew"
                )
            composer_se("slim", str(run), "--data", f"fashion_mnist:{root}")
            slimmed.parent.mkdir(exist_ok=True)
            shutil.copy(run / "slim" / "slim.json", slimmed)


def compare(recipe: str, arms: dict[str, tuple[str, ...]], root: str, folder: Path, *words: str) -> None:
    """Runs `composer-se compare` on the images of these studies."""
    shared = (f"train_dataset.root={root}", TRAINED_ON)
    flat = [word for name, overrides in arms.items() for word in ("--arm", name, *overrides)]
    composer_se("compare", recipe, *shared, "--out", str(folder), *words, *flat)


def composer_se(*arguments: str) -> None:
    """Runs a command in a process of its own, which finds this module. Ends with its exit code if it fails."""
    search_path = filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search_path)}
    done = subprocess.run([sys.executable, "-m", "composer_se.cli", *arguments], env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Continues a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("finetuning", "placement"))
    parser.add_argument("--root", default="data", help="where Fashion-MNIST lies, or is downloaded to (default: data)")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    study = finetuning if args.study == "finetuning" else placement
    study(args.root, args.seeds)


if __name__ == "__main__":
    main()
