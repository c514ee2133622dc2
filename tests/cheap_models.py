"""Models as their libraries build them, made in a fraction of the time, and the smallest input of each.

Random numbers are copied, not drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from composer_se import apply_squeeze_excite, remove_squeeze_excite

_RANDOM_INITIALISERS = (
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
    "trunc_normal_",
    "normal_",
    "uniform_",
)
_NOISE = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def _fill(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    """Fills a tensor with numbers of variance 1 / fan-in, which keep activations within range in any network."""
    fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
    noise = _NOISE * fan_in**-0.5
    with torch.no_grad():
        for piece in tensor.view(-1).split(len(noise)):
            piece.copy_(noise[: len(piece)])
    return tensor


@contextlib.contextmanager
def _copied_random_numbers() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in _RANDOM_INITIALISERS:
            stack.enter_context(mock.patch.object(nn.init, name, _fill))
        yield


def build(constructor: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Builds a model in which a gradient reaches every layer.

    Weights that start at zero (the last norm of residual branches, classifiers) and dropped branches keep it away.
    """
    with _copied_random_numbers():
        model = constructor(*args, **kwargs)
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and not nn.parameter.is_lazy(parameter) and not parameter.flatten()[:64].any():
            with torch.no_grad():
                _fill(parameter) if parameter.dim() > 1 else parameter.fill_(1)
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # pyright: ignore[reportArgumentType]
        elif type(module).__name__ == "DropPath":
            module.drop_prob = 0.0  # pyright: ignore[reportArgumentType]
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, whatever it is made of."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)


def classifier_arguments(name: str) -> tuple[int, dict[str, Any]]:
    """For a classifier of torchvision: the least image size that works, in pixels, and its constructor's arguments."""
    if name.startswith("vit"):
        size = 2 * int(name.split("_")[-1])
        return size, {"image_size": size}
    if name in ("googlenet", "inception_v3"):
        return (64 if name == "googlenet" else 299), {"init_weights": False}
    if name == "maxvit_t":
        return 224, {}
    has_se_blocks = name.startswith(("efficientnet", "mobilenet_v3", "regnet_y"))
    return (64 if has_se_blocks or name == "alexnet" else 32), {}


def detection_arguments(name: str) -> dict[str, Any]:
    """For a detector of torchvision: its constructor's arguments, for images of 64 pixels."""
    arguments: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    if "rcnn" in name:  # 8 proposals instead of 2000: the heads take most of the time
        arguments |= {"rpn_post_nms_top_n_train": 8, "rpn_post_nms_top_n_test": 8, "box_batch_size_per_image": 8}
    return {"weights": None, "weights_backbone": None, **arguments}


def detection_targets() -> list[dict[str, Tensor]]:
    """Targets of a detector for two images of 64 pixels."""
    one = {
        "boxes": torch.tensor([[32.0 - r, 32.0 - r, 32.0 + r, 32.0 + r] for r in (6, 11, 16, 21, 26, 31)]),
        "labels": torch.ones(6, dtype=torch.long),
        "masks": torch.ones(6, 64, 64, dtype=torch.uint8),
        "keypoints": torch.tensor([[[30.0, 30.0, 1.0]] * 17] * 6),
    }
    return [one] * 2


def assert_identity_start_changes_no_bit(model: nn.Module, call: Callable[[nn.Module], Any], **options: Any) -> None:
    """Calls the network before and after the surgery: in training mode with gradients, and in evaluation mode.

    The blocks are taken out again.
    """

    def outputs(training: bool) -> list[Tensor]:
        torch.manual_seed(1)
        with torch.set_grad_enabled(training):
            return list(tensors_of(call(model.train(training))))

    before = [*outputs(True), *outputs(False)]
    assert apply_squeeze_excite(model, 4, 1, init="identity", **options)
    in_evaluation = outputs(False)  # first, since training moves running statistics
    after = [*outputs(True), *in_evaluation]
    assert len(before) == len(after) > 0
    remove_squeeze_excite(model)
    # Single pixels may overflow in networks of random weights.
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
