"""What to train when a pretrained network gets another task: the arms, their learning rates, and the comparison.

    make finetuning

First every arm gets its learning rate. One epoch of 5,000 training images is judged on 2,000 other training images.
Then `composer-se compare` trains all arms with several seeds, and judges them on the test images. The same command
continues what was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

RECIPE = "finetune_fashion_mnist"
FOLDER = Path(__file__).parent / "results" / "finetuning"
NO_SE = "algorithms.squeeze_excite=null"
ARMS = {
    "head": (NO_SE, "trainable=[head]"),
    "norms, head": (NO_SE, "trainable=[norms, head]"),
    "SE, head": (),
    "SE, norms, head": ("trainable=[se, norms, head]",),
    "random SE, head": ("algorithms.squeeze_excite.init=default",),
    "everything": (NO_SE, "trainable=null"),
    "everything, SE": ("trainable=null",),
}
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
NUM_HELD_OUT = 2000


def held_out_training_images(train: bool, root: str) -> Dataset:
    """Training images of Fashion-MNIST that `num_samples` up to 58,000 leaves out, prepared like test images."""
    from composer_se.recipe.image_sets import fashion_mnist
    from composer_se.recipe.loaders import SeededImages

    del train
    images: Any = fashion_mnist(True, root).images
    order = np.random.RandomState(0).permutation(len(images))  # that of `num_samples`
    transform = fashion_mnist(False, root, image_size=64, num_channels=3).transform
    return SeededImages(Subset(images, order[-NUM_HELD_OUT:].tolist()), transform, seed=0)


def tune(root: str) -> dict[str, dict[str, float]]:
    """The accuracies of every arm by learning rate. An arm's best rate has a worse one on either side."""
    path = FOLDER / "tuning.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for arm in ARMS:
        accuracies = found.setdefault(arm, {})
        best, before = LEARNING_RATES.index(1e-3), None
        while best != before:
            before = best
            for i in range(max(0, best - 1), min(best + 2, len(LEARNING_RATES))):
                if str(LEARNING_RATES[i]) not in accuracies:
                    accuracies[str(LEARNING_RATES[i])] = accuracy(arm, LEARNING_RATES[i], root)
                    path.write_text(json.dumps(found, indent=1) + "\n")
            best = LEARNING_RATES.index(best_rate(accuracies))
    return found


def best_rate(accuracies: dict[str, float]) -> float:
    """The learning rate of the highest accuracy."""
    return float(max(accuracies, key=accuracies.__getitem__))


def accuracy(arm: str, learning_rate: float, root: str) -> float:
    """What an arm reaches on the held-out training images."""
    run = Path("runs") / "finetuning-tuning" / f"{arm.replace(', ', '-').replace(' ', '-')}-{learning_rate}"
    overrides = (
        f"run_folder={run}",
        f"train_dataset.root={root}",
        "train_dataset.num_samples=5000",
        f"eval_dataset={{name: 'finetuning_study:held_out_training_images', root: {root}}}",
        "progress_bar=false",
        f"optimizer.lr={learning_rate}",
        *ARMS[arm],
    )
    composer_se("train", RECIPE, *overrides)
    return json.loads((run / "summary.json").read_text())["metrics"]["metrics/eval/MulticlassAccuracy"]


def composer_se(*arguments: str) -> None:
    """Runs a command in a process of its own, which finds this module. Ends with its exit code if it fails."""
    search_path = filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search_path)}
    done = subprocess.run([sys.executable, "-m", "composer_se.cli", *arguments], env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Tunes what is not tuned yet, then compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where Fashion-MNIST lies, or is downloaded to (default: data)")
    parser.add_argument("--seeds", default="5")
    args = parser.parse_args()
    root = str(Path(args.root).absolute())
    found = tune(root)
    arms = [("--arm", arm, *ARMS[arm], f"optimizer.lr={best_rate(found[arm])}") for arm in ARMS]
    shared = (f"train_dataset.root={root}", "train_dataset.num_samples=10000")
    flat = [word for arm in arms for word in arm]
    composer_se("compare", RECIPE, *shared, "--seeds", args.seeds, "--out", str(FOLDER), *flat)


if __name__ == "__main__":
    main()
