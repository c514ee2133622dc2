"""What Squeeze-and-Excitation adds to single layers: to the norm behind each conv, without the conv.

On small machines the times of whole networks scatter by more than SE costs. Single layers resolve it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from composer_se.cost.variants import composers_layers
from composer_se.measure.steps import autocast_context
from composer_se.measure.timing import time_step
from composer_se.measure.uncertainty import Interval, ratio_of_means
from composer_se.modules import SqueezeExciteConv2d
from composer_se.selection import following_norms
from composer_se.show.terminal import Progress

__all__ = ["BUILT_IN", "NORM", "NOTHING", "OURS", "LayerKind", "LayerTimes", "measure_layers"]

NOTHING, NORM, OURS, BUILT_IN = "nothing", "norm", "composer-se", "composer"
UNTIMED, TIMED = 1, 3


@dataclass(frozen=True)
class LayerKind:
    """SE layers of one shape.

    Attributes:
        channels: Channels of the map.
        height: Its height.
        width: Its width.
        latent_channels: Hidden width of the block.
        norm: Class of the norm that follows, or "none".
        count: How many of them the network has.
    """

    channels: int
    height: int
    width: int
    latent_channels: int
    norm: str
    count: int


@dataclass(frozen=True)
class LayerTimes:
    """What was measured.

    Attributes:
        kinds: The different layers.
        seconds: Per mode ("training", "inference, batch 1", …), per variant, per kind of layer, one for each round.
    """

    kinds: list[LayerKind]
    seconds: dict[str, dict[str, list[list[float]]]]

    def milliseconds(self, mode: str, variant: str, kind: int) -> float:
        """What the norm of one layer takes, or what a variant adds to it."""
        of_mode = self.seconds[mode]
        base = of_mode[NOTHING if variant == NORM else NORM][kind]
        return 1e3 * median(t - b for t, b in zip(of_mode[variant][kind], base, strict=True))

    def added(self, mode: str, variant: str) -> list[float]:
        """What a variant adds to the norms of all layers of the network, in seconds, for each round."""
        of_mode = self.seconds[mode]
        per_kind = [
            [kind.count * (t - b) for t, b in zip(of_mode[variant][i], of_mode[NORM][i], strict=True)]
            for i, kind in enumerate(self.kinds)
        ]
        return [sum(of_round) for of_round in zip(*per_kind, strict=True)]

    def share(self, mode: str) -> Interval:
        """What ours adds, over what Composer's built-in adds."""
        return ratio_of_means(self.added(mode, OURS), self.added(mode, BUILT_IN))


@dataclass(frozen=True)
class _Layer:
    """One layer of a kind, to be run alone, with what its conv makes of one image."""

    wrapper: SqueezeExciteConv2d
    norm: nn.Module | None
    u: Tensor


def measure_layers(
    network: nn.Module,
    images: Tensor,
    *,
    precision: str,
    compiled: bool,
    against_composer: bool,
    rounds: int,
    progress: Progress,
) -> LayerTimes:
    """Times every different SE layer of a network alone.

    A step starts with a map of random numbers in the place of the conv's output. Variants are: the map alone, with its
    norm, and with SE and norm. In each round every layer and variant is visited once, in random order.

    Args:
        network: With our SE, on its device and in its memory format.
        images: A batch for it, (N, C, H, W).
        precision: "fp32", "amp_bf16" or "amp_fp16".
        compiled: Whether layers go through `torch.compile`.
        against_composer: Whether Composer's built-in is measured too.
        rounds: Visits to each layer and variant.
        progress: Told what is going on.

    Returns:
        The times.
    """
    autocast = autocast_context(precision, images.device)
    layers = _different_layers(network, images, autocast)
    modes = {"training": (True, len(images))}
    modes |= {f"inference, batch {n}": (False, n) for n in sorted({1, len(images)})}
    seconds: dict[str, dict[str, list[list[float]]]] = {}
    for at, (mode, (training, batch_size)) in enumerate(modes.items()):
        steps: dict[tuple[str, int], Callable[[], object]] = {}
        for i, layer in enumerate(layers.values()):
            u = torch.randn_like(layer.u.expand(batch_size, -1, -1, -1).contiguous(memory_format=_format_of(layer.u)))
            for name, forward in _variants(layer, training, against_composer).items():
                called = torch.compile(forward, dynamic=False) if compiled else forward
                steps[name, i] = (
                    _training_step(called, u, autocast) if training else _inference_step(called, u, autocast)
                )
        names = dict.fromkeys(name for name, _ in steps)
        seconds[mode] = {name: [[] for _ in layers] for name in names}
        order = list(steps)
        for r in range(rounds):
            random.Random(r).shuffle(order)
            for name, i in order:
                for _ in range(UNTIMED):
                    steps[name, i]()
                times = [time_step(steps[name, i], images.device) for _ in range(TIMED)]
                seconds[mode][name][i].append(median(times))
            progress(f"layers, {mode}", at * rounds + r + 1, len(modes) * rounds)
    return LayerTimes(list(layers), seconds)


def _different_layers(network: nn.Module, images: Tensor, autocast: Callable[[], Any]) -> dict[LayerKind, _Layer]:
    norms, outputs = following_norms(network), {}
    wrappers = [module for module in network.modules() if isinstance(module, SqueezeExciteConv2d)]
    handles = [
        wrapper.conv.register_forward_hook(lambda conv, _, u: outputs.setdefault(conv, u[:1].detach().clone()))
        for wrapper in wrappers
    ]
    with torch.no_grad(), autocast():
        network.eval()(images)
    for handle in handles:
        handle.remove()
    found: dict[LayerKind, list[_Layer]] = {}
    for wrapper in wrappers:
        if wrapper.conv not in outputs:
            continue
        u, norm = outputs[wrapper.conv], norms.get(wrapper)
        _, channels, height, width = u.shape
        name = "none" if norm is None else type(norm).__name__
        kind = LayerKind(channels, height, width, wrapper.se.latent_channels, name, 1)
        found.setdefault(kind, []).append(_Layer(copy.deepcopy(wrapper), copy.deepcopy(norm), u))
    return {replace(kind, count=len(same)): same[0] for kind, same in found.items()}


def _variants(layer: _Layer, training: bool, against_composer: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    norm = nn.Identity() if layer.norm is None else layer.norm.train(training)
    scale = layer.wrapper.train(training).scale
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        NOTHING: lambda u: u,
        NORM: lambda u: norm(u),
        OURS: lambda u: norm(scale(u)),
    }
    if against_composer:
        channels, width = layer.wrapper.conv.out_channels, layer.wrapper.se.latent_channels
        composers = composers_layers().SqueezeExcite2d(channels, width).to(layer.u.device).train(training)
        variants[BUILT_IN] = lambda u: norm(composers(u))
    return variants


def _training_step(forward: Callable[[Tensor], Tensor], u: Tensor, autocast: Callable[[], Any]) -> Callable[[], None]:
    leaf, gradient = u.clone().requires_grad_(), torch.randn_like(u)

    def step() -> None:
        leaf.grad = None
        with autocast():
            y = forward(leaf * 1)  # a map that nobody else holds, as a conv's output is
        y.backward(gradient)

    return step


def _inference_step(forward: Callable[[Tensor], Tensor], u: Tensor, autocast: Callable[[], Any]) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode(), autocast():
            forward(u.clone())

    return step


def _format_of(u: Tensor) -> torch.memory_format:
    return torch.contiguous_format if u.is_contiguous() else torch.channels_last
