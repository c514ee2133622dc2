"""Measures the latency of a network with all, some and none of its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from composer_se.measure.steps import inference_step
from composer_se.measure.timing import time_in_turns
from composer_se.show.terminal import Progress, counted
from composer_se.slim.search import Point, fold_first

__all__ = ["BATCH_SIZES", "measure_latencies"]

BATCH_SIZES = (1, 16)
ROUNDS = 5
_SHOWN = 9  # evenly spread points of the curve, beside the chosen one


def measure_latencies(
    network: nn.Module,
    means: Mapping[str, Tensor],
    points: Sequence[Point],
    chosen: int,
    images: Tensor,
    advance: Progress,
) -> dict[int, dict[int, list[float]]]:
    """Times the network at some points of the curve: all blocks, none, the chosen number, and some between them.

    Args:
        network: The network, in evaluation mode.
        means: The mean gates by layer.
        points: The curve.
        chosen: The chosen number of fixed blocks.
        images: Some images, (N, C, H, W), on the network's device.
        advance: Called after each visit.

    Returns:
        By batch size and number of fixed blocks, the seconds of a forward pass in every round.
    """
    last = len(points) - 1
    counts = sorted({chosen, *torch.linspace(0, last, min(_SHOWN, last + 1)).round().int().tolist()})
    networks = {str(count): fold_first(network, means, points, count) for count in counts}
    visited = counted(advance, ROUNDS * len(networks) * len(BATCH_SIZES))
    found = {}
    for batch_size in BATCH_SIZES:
        batch = images[torch.arange(batch_size) % len(images)]
        seconds = time_in_turns(
            {count: [partial(inference_step, folded, batch, nullcontext)] for count, folded in networks.items()},
            rounds=ROUNDS,
            device=images.device,
            seed=0,
            visited=partial(visited, f"timing inference, batch {batch_size}"),
        )
        found[batch_size] = {int(count): times for count, [times] in seconds.items()}
    return found
