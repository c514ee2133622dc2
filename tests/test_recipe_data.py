"""Data sets, their splits, and augmentation that depends on seed, epoch and index only."""

from __future__ import annotations

import gzip
import importlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.algorithms import RandAugmentTransform
from composer.utils.misc import add_vision_dataset_transform
from torchvision.transforms import ToTensor

from composer_se.errors import UserError
from composer_se.parts.data import DATASETS, image_size
from composer_se.parts.image_sets import cifar10, digits, fashion_mnist, imagenet, synthetic
from composer_se.parts.loaders import SeededImages
from composer_se.recipe.load import load_recipe
from composer_se.recipe.trainer import build_parts
from composer_se.recipe.validate import make_plan


def test_digits_split_is_stratified_complete_and_always_the_same() -> None:
    train, held_out = digits(train=True), digits(train=False)
    assert (len(train.images), len(held_out.images)) == (1437, 360)  # type: ignore[arg-type]
    counts = np.bincount(held_out.images.labels)  # type: ignore[attr-defined]
    assert counts.min() >= 34
    assert counts.max() <= 38
    seen = {image.tobytes() for image in train.images.images}  # type: ignore[attr-defined]
    assert not seen & {image.tobytes() for image in held_out.images.images}  # type: ignore[attr-defined]
    assert np.array_equal(held_out.images.labels, digits(train=False).images.labels)  # type: ignore[attr-defined]


def batches(num_workers: int, epoch: int, seed: int = 1) -> list[torch.Tensor]:
    loader = digits(train=True).loader(64, seed, True, num_workers, pin_memory=False)
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [images for (images, _), _ in zip(loader, range(3), strict=False)]


def test_augmentation_is_a_function_of_seed_epoch_and_index() -> None:
    torch.manual_seed(0)
    first = torch.stack(batches(0, epoch=2))
    torch.rand(3)  # what the global generators did before must not matter, nor the number of workers
    assert torch.equal(first, torch.stack(batches(0, epoch=2)))
    assert torch.equal(first, torch.stack(batches(2, epoch=2)))
    assert not torch.equal(first, torch.stack(batches(0, epoch=3)))
    assert not torch.equal(first, torch.stack(batches(0, epoch=2, seed=5)))


def test_augmentation_varies_between_epochs_for_one_image() -> None:
    data = digits(train=True)
    images = SeededImages(data.images, data.transform, seed=1)
    assert torch.equal(images[0, 5][0], images[0, 5][0])
    assert not torch.equal(images[0, 5][0], images[1, 5][0])


def test_loading_leaves_the_random_generators_alone() -> None:
    data = digits(train=True)
    images = SeededImages(data.images, data.transform, seed=1)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    images.__getitems__([(0, 1), (0, 2)])
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_composers_image_transforms_come_before_the_tensor() -> None:
    data = digits(train=True)
    images = SeededImages(data.images, data.transform, seed=1)
    add_vision_dataset_transform(images, RandAugmentTransform())
    steps = images.transform.transforms  # type: ignore[union-attr]
    assert [type(step) for step in steps].index(RandAugmentTransform) < [type(s) for s in steps].index(ToTensor)
    assert images[0, 5][0].shape == (1, 8, 8)


def test_synthetic_images_are_a_function_of_the_index() -> None:
    first, second = synthetic(train=True, image_size=8), synthetic(train=False, image_size=8)
    assert torch.equal(first.images[3][0], second.images[3][0])
    assert not torch.equal(first.images[3][0], first.images[4][0])
    assert first.images[1003][1] == 3


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    return gzip.compress(header + array.tobytes())


def test_fashion_mnist_reads_a_flat_folder_of_the_original_files(tmp_path: Path) -> None:
    pixels = np.arange(2 * 28 * 28).reshape(2, 28, 28).astype(np.uint8)
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(np.array([3, 9], dtype=np.uint8)))
    data = fashion_mnist(train=False, root=str(tmp_path))
    image, label = data.images[1]
    assert np.array_equal(np.asarray(image), pixels[1])
    assert label == 9
    padded, plain = (fashion_mnist(train=True, root=str(tmp_path), padding=padding) for padding in (4, 0))
    assert plain.transform is not None
    assert padded.transform is not None
    seen = {tuple(plain.transform(image).flatten().tolist()) for _ in range(20)}
    assert len(seen) == 2  # as it is and mirrored
    assert len({tuple(padded.transform(image).flatten().tolist()) for _ in range(20)}) > 2
    for wrong, message in (
        ({"padding": -1}, "padding must be 0 or more, got -1"),
        ({"image_size": 0}, "image_size must be 1 or more, got 0"),
        ({"num_samples": 3}, "num_samples must be 1 to 2, got 3"),
        ({"num_samples": 0}, "num_samples must be 1 to 2, got 0"),
        ({"num_samples": 1, "train": False}, "num_samples is for training images"),
    ):
        with pytest.raises(ValueError, match=message):
            fashion_mnist(**{"train": True, "root": str(tmp_path), **wrong})


def test_images_that_a_study_chooses_by_are_training_images_that_it_does_not_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prefix, first in (("train", 0), ("t10k", 100)):
        pixels = np.repeat(np.arange(first, first + 50, dtype=np.uint8), 28 * 28).reshape(50, 28, 28)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(50, dtype=np.uint8)))
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs")
    make = importlib.import_module("evidence").held_out_training_images
    trained = fashion_mnist(train=True, root=str(tmp_path), num_samples=30)
    shown = {round(float(image.mean()), 4) for image, _ in make(False, str(tmp_path), 20)}
    assert len(shown) == 20
    every = fashion_mnist(train=False, root=str(tmp_path), num_channels=1)  # prepared alike
    assert every.transform is not None
    values = {round(float(every.transform(trained.images[i][0]).mean()), 4) for i in range(30)}
    tests = {round(float(every.transform(every.images[i][0]).mean()), 4) for i in range(50)}  # type: ignore[arg-type]
    assert len(values) == 30
    assert not shown & (values | tests)


def test_fashion_mnist_is_brought_to_the_size_channels_and_scale_of_a_pretrained_network(tmp_path: Path) -> None:
    pixels = np.stack([np.full((28, 28), value, dtype=np.uint8) for value in range(0, 250, 50)])
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(5, dtype=np.uint8)))
    data = fashion_mnist(train=True, root=str(tmp_path), padding=0, image_size=64, num_channels=3, num_samples=4)
    items = [SeededImages(data.images, data.transform, seed=0)[index] for index in range(4)]
    labels = [label for _, label in items]
    assert len(set(labels)) == 4
    assert labels != [0, 1, 2, 3]  # at random, but always the same
    again = fashion_mnist(train=True, root=str(tmp_path), num_samples=2)
    assert [again.images[index][1] for index in range(2)] == labels[:2]
    for image, label in items:
        assert image.shape == (3, 64, 64)
        assert torch.allclose(image, torch.full((3, 64, 64), (50 * label - 127) / 128), atol=1e-6)
    held_out = fashion_mnist(train=False, root=str(tmp_path), image_size=32)
    assert SeededImages(held_out.images, held_out.transform, seed=0)[4][0].shape == (1, 32, 32)
    assert len(held_out.images) == 5  # type: ignore[arg-type]


def test_imagenet_reads_a_tree_of_image_files(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 30), "red").save(tmp_path / split / name / "1.png")
    for train in (True, False):
        data = imagenet(train, root=str(tmp_path), image_size=16)
        image, label = SeededImages(data.images, data.transform, seed=0)[1]
        assert image.shape == (3, 16, 16)
        assert label == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(tmp_path: Path, num_workers: int) -> None:
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(b"no image")
    loader = imagenet(train=True, root=str(tmp_path)).loader(1, 0, True, num_workers, pin_memory=False)
    with pytest.raises(UserError) as error:
        next(iter(loader))
    assert str(error.value).startswith(f"{folder / '1.jpg'}: can't be read (no image of a known format")
    assert "\n" not in str(error.value)


def test_folders_of_classes_that_number_them_differently_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    for folder in ("one/train/cat", "one/train/dog", "two/val/dog", "two/val/owl"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(tmp_path / folder / "1.png")
    one, two = (f"{{name: imagenet, root: {tmp_path / root}, image_size: 16}}" for root in ("one", "two"))
    overrides = [f"train_dataset={one}", f"eval_dataset={two}", "model.in_channels=3", "train_batch_size=1"]
    recipe = load_recipe("digits", overrides)
    with pytest.raises(
        UserError, match="eval_dataset: its classes are not those of train_dataset .'cat', 'owl' in one"
    ):
        build_parts(recipe, make_plan(recipe))


def test_every_data_set_says_how_large_its_images_are() -> None:
    sizes = {name: image_size({"name": name}) for name in DATASETS}
    assert None not in sizes.values()
    assert (sizes["digits"], sizes["fashion_mnist"], sizes["imagenet"]) == (8, 28, 224)
    assert image_size({"name": "streaming", "image_size": 160}) == 160


def test_missing_data_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
    with pytest.raises(ValueError, match=r"root .*doesn't hold CIFAR10.*no network"):
        cifar10(train=True, root=str(tmp_path))


def test_streamed_shards_are_shuffled_and_augmented_by_epoch(tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming")
    from PIL import Image

    from composer_se.parts.image_sets import streaming as streamed

    rng = np.random.default_rng(0)
    with streaming.MDSWriter(out=str(tmp_path / "train"), columns={"x": "jpeg", "y": "int"}) as writer:
        for label in range(16):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            writer.write({"x": Image.fromarray(pixels), "y": label})
    data = streamed(train=True, local=str(tmp_path), split="train", image_size=16, num_canonical_nodes=1)
    loader = data.loader(8, 1, True, 0, pin_memory=False)
    epochs = [[(images, labels) for images, labels in loader] for _ in range(2)]
    assert sorted(torch.cat([labels for _, labels in epochs[0]]).tolist()) == list(range(16))
    assert epochs[0][0][0].shape == (8, 3, 16, 16)
    assert epochs[0][0][1].tolist() != epochs[1][0][1].tolist()
