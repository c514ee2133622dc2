"""Fixes gates at their means, one block after the other, the least costly first.

The cost of a block is the increase of the cross entropy when its gates are fixed, given the blocks fixed before. The
accuracy on a few thousand images is too coarse to rank blocks; it only decides how many blocks are fixed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composer_se.folding import fold_constant_gates
from composer_se.gates.analysis import Score, on_device, score
from composer_se.gates.observe import gate_sums, moments, observing, se_blocks

__all__ = ["Point", "find_curve", "fold_first", "mean_gates", "most_fixed"]

Batches = Iterable[Any]
"""Yields (images, labels); can be iterated over again."""


@dataclass(frozen=True)
class Point:
    """The network after one more block was fixed.

    Attributes:
        fixed: The layer whose block it was; None for the network with all blocks.
        parameters: The number of the network's parameters.
        deciding: The score on the images that decide which blocks are fixed.
        reporting: The score on the images that decide nothing.
    """

    fixed: str | None
    parameters: int
    deciding: Score
    reporting: Score


@torch.no_grad()
def mean_gates(network: nn.Module, batches: Batches) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The mean gates of the blocks that can be folded, (C,) each, and the reasons why the others can't.

    Args:
        network: The network, in evaluation mode.
        batches: The images.

    Returns:
        Mean gates and reasons, each by the name of the layer.
    """
    blocks = se_blocks(network)
    sums: dict[str, Tensor] = {}

    def see(name: str, logits: Tensor) -> None:
        sums[name] = sums.get(name, 0) + gate_sums(logits, blocks[name].gate_limit).cpu()

    with observing(blocks, see):
        for images, _ in on_device(batches, network):
            network(images)
    means = {name: moments(sums[name])[0] for name in blocks if name in sums}
    reasons = {name: "it never runs" for name in blocks if name not in sums}
    for name, mean in list(means.items()):
        try:
            fold_constant_gates(copy.deepcopy(network), {name: mean})
        except ValueError as error:
            reasons[name] = str(error)
            del means[name]
    return means, reasons


def find_curve(
    network: nn.Module,
    means: Mapping[str, Tensor],
    deciding: Batches,
    reporting: Batches,
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Point]:
    """Fixes all blocks one after the other, the least costly first.

    Measures a block's cost again only when it is the lowest on record, and fixes the block if it still is. So fixing n
    blocks takes a few times n passes over the deciding images instead of n²/2.

    Args:
        network: The network, in evaluation mode. It is not changed: the blocks are fixed in a copy.
        means: The mean gates by layer, from `mean_gates`.
        deciding: The images that the costs are measured on.
        reporting: The images that decide nothing.
        advance: Called with the task, the number of blocks fixed, and the number of all blocks.

    Returns:
        A point for the network with all blocks, then one for each block fixed.
    """
    current = copy.deepcopy(network)
    outcome = before = _evaluate(current, deciding)
    reported = reported_before = _evaluate(current, reporting)

    def point(fixed: str | None) -> Point:
        parameters = sum(parameter.numel() for parameter in current.parameters())
        decided = score(before.right, outcome.right)
        return Point(fixed, parameters, decided, score(reported_before.right, reported.right))

    points = [point(None)]
    costs = dict.fromkeys(means, float("-inf"))
    while costs:
        advance("fixing one block after the other", len(points) - 1, len(means))
        trials: dict[str, _Outcome] = {}
        while (name := min(costs, key=costs.__getitem__)) not in trials:
            trial = copy.deepcopy(current)
            fold_constant_gates(trial, {name: means[name]})
            trials[name] = _evaluate(trial, deciding)
            costs[name] = trials[name].cross_entropy - outcome.cross_entropy
        del costs[name]
        fold_constant_gates(current, {name: means[name]})
        outcome, reported = trials[name], _evaluate(current, reporting)
        points.append(point(name))
    return points


def most_fixed(points: Sequence[Point], tolerance: float) -> int:
    """The most blocks that can be fixed while the deciding images lose at most `tolerance` points of accuracy."""
    rounding = 1e-9
    return max(k for k, point in enumerate(points) if -100 * point.deciding.change.value <= tolerance + rounding)


def fold_first(network: nn.Module, means: Mapping[str, Tensor], points: Sequence[Point], count: int) -> nn.Module:
    """A copy of the network in which the first `count` blocks of the curve are folded."""
    folded = copy.deepcopy(network)
    fold_constant_gates(folded, {point.fixed: means[point.fixed] for point in points[: count + 1] if point.fixed})
    return folded


@dataclass(frozen=True)
class _Outcome:
    """True for each image that was classified correctly, (N,), and the mean cross entropy."""

    right: Tensor
    cross_entropy: float


@torch.no_grad()
def _evaluate(network: nn.Module, batches: Batches) -> _Outcome:
    right: list[Tensor] = []
    losses: list[Tensor] = []
    for images, labels in on_device(batches, network):
        outputs = network(images)
        right.append((outputs.argmax(1) == labels).cpu())
        losses.append(F.cross_entropy(outputs.float(), labels, reduction="none").cpu().double())
    return _Outcome(torch.cat(right), float(torch.cat(losses).mean()))
