"""Times what Squeeze-and-Excitation adds to single layers: to the norm after each conv, without the conv.

On small machines the times of whole networks scatter by more than SE costs. Times of single layers scatter less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from composer_se.cost.settings import Settings
from composer_se.cost.variants import CalledLayer, called_layers, composers_layers
from composer_se.measure.timing import time_in_turns
from composer_se.measure.uncertainty import Interval, ratio_of_means
from composer_se.show.terminal import Progress, counted
from composer_se.wrapper import SqueezeExcited

__all__ = ["BUILT_IN", "NORM", "NOTHING", "OURS", "LayerKind", "LayerTimes", "measure_layers"]

NOTHING, NORM, OURS, BUILT_IN = "nothing", "norm", "composer-se", "composer"
VISIT = (1, 3)  # untimed and timed steps
ROUNDS_PER_ROUND = 5  # rounds of layers per round of networks, since a visit to a layer is much shorter


@dataclass(frozen=True)
class LayerKind:
    """The SE layers with the same map, block width and class of norm ("none" if there is no norm), and their number."""

    channels: int
    height: int
    width: int
    latent_channels: int
    norm: str
    count: int


@dataclass(frozen=True)
class LayerTimes:
    """The kinds of layers, and their times in seconds by mode, variant, kind and round."""

    kinds: list[LayerKind]
    seconds: dict[str, dict[str, list[list[float]]]]

    def milliseconds(self, mode: str, variant: str, kind: int) -> float:
        """The median time of one layer's norm, or the median time that another variant adds to it."""
        base = NOTHING if variant == NORM else NORM
        return 1e3 * float(np.median(self._difference(mode, variant, base)[kind]))

    def added(self, mode: str, variant: str) -> list[float]:
        """The seconds that a variant adds to the norms of all layers of the network, for each round."""
        counts = [kind.count for kind in self.kinds]
        return (counts @ self._difference(mode, variant, NORM)).tolist()

    def share(self, mode: str) -> Interval:
        """The time that ours adds, divided by the time that Composer's built-in adds."""
        return ratio_of_means(self.added(mode, OURS), self.added(mode, BUILT_IN))

    def _difference(self, mode: str, variant: str, base: str) -> np.ndarray:
        return np.subtract(self.seconds[mode][variant], self.seconds[mode][base])


def measure_layers(network: nn.Module, images: Tensor, settings: Settings, progress: Progress) -> LayerTimes:
    """Times one SE layer of each kind alone.

    A step starts from a map of random numbers instead of the conv's output. The variants are: nothing but the map, the
    norm, and the norm with SE (ours, and Composer's if the settings ask for it). Each round times every layer and
    variant once, in random order.

    Args:
        network: The network with our SE, on its device and in its memory format.
        images: A batch for it, (N, C, H, W).
        settings: The settings of the study.
        progress: Called after each visit.
    """
    layers = _different_layers(network, images[:1], settings)
    modes = {"training": (True, len(images))}
    modes |= {f"inference, batch {n}": (False, n) for n in sorted({1, len(images)})}
    rounds = ROUNDS_PER_ROUND * settings.rounds
    num_variants = 4 if settings.against_composer else 3
    advance = counted(progress, len(modes) * rounds * len(layers) * num_variants)
    seconds: dict[str, dict[str, list[list[float]]]] = {}
    for mode, (training, batch_size) in modes.items():
        steps: dict[str, list[Callable[[], object]]] = {}
        for layer in layers.values():
            layout = torch.contiguous_format if layer.map.is_contiguous() else torch.channels_last
            u = torch.randn_like(layer.map.expand(batch_size, -1, -1, -1).contiguous(memory_format=layout))
            for name, forward in _variants(layer, training, settings.against_composer).items():
                make_step = _training_step if training else _inference_step
                steps.setdefault(name, []).append(make_step(settings.compile(forward), u, settings.autocast))
        seconds[mode] = time_in_turns(
            steps,
            rounds=rounds,
            device=images.device,
            seed=0,
            visit=VISIT,
            visited=lambda mode=mode: advance(f"layers, {mode}"),
        )
    return LayerTimes(list(layers), seconds)


def _different_layers(network: nn.Module, image: Tensor, settings: Settings) -> dict[LayerKind, CalledLayer]:
    names = [name for name, module in network.named_modules() if isinstance(module, SqueezeExcited)]
    found: dict[LayerKind, list[CalledLayer]] = {}
    for layer in called_layers(network, names, image, settings.autocast):
        norm = "none" if layer.norm is None else type(layer.norm).__name__
        _, channels, height, width = layer.map.shape
        latent_channels = cast(SqueezeExcited, layer.wrapper).se.latent_channels
        found.setdefault(LayerKind(channels, height, width, latent_channels, norm, 1), []).append(layer)
    return {replace(kind, count=len(same)): copy.deepcopy(same[0]) for kind, same in found.items()}


def _variants(layer: CalledLayer, training: bool, against_composer: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    wrapper: Any = layer.wrapper.train(training)
    norm = nn.Identity() if layer.norm is None else layer.norm.train(training)
    after_norm = layer.norm is layer.bare
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        NOTHING: lambda u: u,
        NORM: lambda u: norm(u),
        OURS: (lambda u: wrapper(u)) if after_norm else (lambda u: norm(wrapper.scale(u))),
    }
    if against_composer:
        composers = composers_layers().SqueezeExcite2d(layer.map.shape[1], wrapper.se.latent_channels)
        composers = composers.to(layer.map.device).train(training)
        variants[BUILT_IN] = (lambda u: composers(norm(u))) if after_norm else (lambda u: norm(composers(u)))
    return variants


def _training_step(forward: Callable[[Tensor], Tensor], u: Tensor, autocast: Callable[[], Any]) -> Callable[[], None]:
    leaf, gradient = u.clone().requires_grad_(), torch.randn_like(u)

    def step() -> None:
        leaf.grad = None
        with autocast():
            y = forward(leaf * 1)  # a new map that no other code holds, like a conv's output
        y.backward(gradient)

    return step


def _inference_step(forward: Callable[[Tensor], Tensor], u: Tensor, autocast: Callable[[], Any]) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode(), autocast():
            forward(u.clone())

    return step
