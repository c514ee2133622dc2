"""Analyses gates by class, and the accuracy that is lost without them.

Follows section 6.4 of Squeeze-and-Excitation Networks (Hu et al., https://arxiv.org/abs/1709.01507). There, gates of
shallow layers hardly depend on the class, gates of deep layers do, and gates of the last layers hardly matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from composer_se.errors import UserError
from composer_se.gates.observe import (
    GateStatistics,
    describe,
    gate_terms,
    moments,
    observe_logits,
    observing,
    se_blocks,
)
from composer_se.measure.uncertainty import Interval, change_of_share

__all__ = ["Analysis", "LayerGates", "Score", "analyse", "on_device", "score"]


@dataclass(frozen=True)
class Score:
    """The accuracy on some images, and its change from the unmodified network, with a 95 % interval."""

    accuracy: float
    change: Interval

    @property
    def harmless(self) -> bool:
        """True if these images show no loss of accuracy."""
        return not self.change.high < 0


@dataclass(frozen=True)
class LayerGates:
    """The gates of one layer."""

    name: str  # of the conv or norm that has the block
    overall: GateStatistics
    by_class: list[GateStatistics | None]  # None for a class without images
    # Share of the gates' variance over images that the class explains: 0 if the gates don't depend on the class, 1 if
    # they depend on nothing else.
    class_share: float
    channel_means: Tensor  # (C,)
    channel_stds: Tensor  # over images, (C,)
    class_channel_means: Tensor  # (K, C)
    limit: float  # no gate is larger
    ablation: Score  # with the gates fixed at `channel_means`


@dataclass(frozen=True)
class Analysis:
    """All layers in model order, and the accuracy with all gates."""

    layers: list[LayerGates]
    accuracy: float
    num_images: int


def analyse(
    network: nn.Module,
    batches: Iterable[Any],
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Analysis:
    """Observes all gates on held-out images, then fixes those of one layer at a time.

    A fixed gate is the mean of its channel over these images. It can be multiplied into the layer's weights, so a layer
    that loses no accuracy needs no block at inference. Gates fixed at 1 would also change the scale that the next
    normalisation layer expects.

    Args:
        network: The network, in evaluation mode. It is not changed.
        batches: Yields (images, class numbers); iterated over twice.
        advance: Called with the task, the batches done, and their number (0 if unknown).

    Raises:
        UserError: If the labels are no class numbers of the network, there are no images, or no layer runs.
    """
    blocks = se_blocks(network)
    total = len(batches) if hasattr(batches, "__len__") else 0  # pyright: ignore[reportArgumentType]
    sums: dict[str, Tensor] = {}
    right: list[Tensor] = []
    for done, (images, labels) in enumerate(on_device(batches, network)):
        outputs, terms = _observe(network, blocks, images)
        if labels.max() >= outputs.shape[1]:
            raise UserError(
                f"--data: an image has label {labels.max()}, but the network has {outputs.shape[1]} outputs; name "
                "data of the classes that it was trained on"
            )
        right.append((outputs.argmax(1) == labels).cpu())
        for name, found in terms.items():
            by_class = found.new_zeros(outputs.shape[1], found.shape[1])
            sums[name] = sums.get(name, 0) + by_class.index_add_(0, _repeated(labels, found), found)
        advance("observing all gates", done + 1, 2 * total)
    if not right:
        raise UserError("--data: there are no held-out images")
    if not sums:
        raise UserError(
            "the network has Squeeze-and-Excitation layers, but its forward pass runs none of them; check which "
            "modules it calls, or choose other convs with algorithms.squeeze_excite.include"
        )
    sums = {name: sums[name] for name in blocks if name in sums}  # a layer that never runs has no gates
    shares = {name: moments(s.sum(0))[0] / blocks[name].gate_limit for name, s in sums.items()}
    fixed = {name: torch.logit(share, eps=1e-6) for name, share in shares.items()}
    right_fixed: dict[str, list[Tensor]] = {name: [] for name in sums}
    for done, (images, labels) in enumerate(on_device(batches, network)):
        for name, logits in fixed.items():
            right_fixed[name].append(_with_fixed_gate(network, blocks[name], logits, images, labels))
        advance("fixing one layer at a time", total + done + 1, 2 * total)
    verdicts = torch.cat(right)
    layers = [
        _layer(name, blocks[name].gate_limit, s, score(verdicts, torch.cat(right_fixed[name])))
        for name, s in sums.items()
    ]
    return Analysis(layers, float(verdicts.double().mean()), len(verdicts))


def on_device(batches: Iterable[Any], network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the images and labels of batches on the network's device.

    Raises:
        UserError: If the labels are no class numbers.
    """
    device = next(network.parameters()).device
    for images, labels in batches:
        if labels.ndim != 1 or labels.is_floating_point():
            raise UserError(f"--data: the labels have shape {tuple(labels.shape)}; expected one class number per image")
        yield images.to(device), labels.to(device)


@torch.no_grad()
def _observe(network: nn.Module, blocks: dict[str, Any], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs a batch, and returns the outputs and the `gate_terms` of every layer that ran."""
    terms: dict[str, list[Tensor]] = {name: [] for name in blocks}
    with observing(blocks, lambda name, logits: terms[name].append(gate_terms(logits, blocks[name].gate_limit))):
        outputs = network(images)
    return outputs, {name: torch.cat(found) for name, found in terms.items() if found}


@torch.no_grad()
def _with_fixed_gate(network: nn.Module, block: Any, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    with observe_logits(block, lambda alive: logits.to(alive.dtype).expand_as(alive)):
        return (network(images).argmax(1) == labels).cpu()


def _repeated(labels: Tensor, terms: Tensor) -> Tensor:
    """The labels, repeated for each call of a layer that runs several times in one forward pass."""
    return labels.repeat(len(terms) // len(labels))


def score(before: Tensor, after: Tensor) -> Score:
    """Scores the images classified correctly after a change against those before, (N,) booleans each."""
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    return Score(float(after.double().mean()), change_of_share(lost, gained, len(before)))


def _layer(name: str, limit: float, sums: Tensor, ablation: Score) -> LayerGates:
    sums = sums.cpu()
    total = sums.sum(0)
    means, variance = moments(total)
    class_means = moments(sums)[0]
    weights = (sums[:, :1] / total[0]).expand_as(class_means)
    between = torch.where(weights > 0, weights * (class_means - means).square(), 0).sum()
    return LayerGates(
        name=name,
        overall=GateStatistics(*describe(total).tolist()),
        by_class=[GateStatistics(*describe(row).tolist()) if row[0] > 0 else None for row in sums],
        class_share=float(between / variance.sum()) if variance.sum() > 0 else 0.0,
        channel_means=means,
        channel_stds=variance.sqrt(),
        class_channel_means=class_means,
        limit=limit,
        ablation=ablation,
    )
