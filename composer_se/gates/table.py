"""An analysis as a table for the terminal and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from composer_se.gates.analysis import Analysis
from composer_se.gates.picture import pictured_classes
from composer_se.show.terminal import new_table
from composer_se.show.text import plural

__all__ = ["as_dict", "print_analysis"]

_HEADS = ("mean", "std\nimages", "std\nchannels", "near\n0", "near\n1", "class", "fixed")
_CAPTION = (
    "std: how far a channel's gate varies over images, and how far channels differ. near: share of gates below 5 % and "
    "above 95 % of the largest possible. class: share of the variance over images that the class explains. fixed: "
    "change of the accuracy when the layer's gates are fixed at their means, in percentage points ± half its 95 % "
    "interval. A smaller change may be chance."
)


def print_analysis(title: str, analysis: Analysis, console: Console) -> None:
    """Prints a row per layer, the accuracy, and the layers whose fixed gates showed no loss."""
    table = new_table(title, _CAPTION, "layer", _HEADS, side=0)
    for layer in analysis.layers:
        gates, ablation = layer.overall, layer.ablation
        table.add_row(
            layer.name,
            f"{gates.mean:.2f}",
            f"{gates.std_over_samples:.3f}",
            f"{gates.std_over_channels:.3f}",
            f"{gates.share_near_0:.0%}",
            f"{gates.share_near_1:.0%}",
            f"{layer.class_share:.0%}",
            f"{100 * ablation.change.value:+.2f} ± {100 * ablation.change.half_width:.2f}",
            style="dim" if ablation.harmless else "",
        )
    console.print(table)
    console.print(f"Accuracy with all gates: {analysis.accuracy:.2%}", highlight=False)
    spare = [layer for layer in analysis.layers if layer.ablation.harmless]
    if spare:
        surest_first = sorted(spare, key=lambda layer: -layer.ablation.change.low)
        missed = 100 * max(layer.ablation.change.half_width for layer in spare)
        console.print(
            f"Fixing the gates of one layer showed no loss in {plural(len(spare), 'layer')}, surest first: "
            f"{', '.join(layer.name for layer in surest_first)}. {analysis.num_images:,} images can miss a loss of "
            f"{missed:.2f} points. Each layer was tried alone, and several together may cost more: "
            "composer-se slim fixes one after the other.",
            highlight=False,
        )


def as_dict(analysis: Analysis, classes: Sequence[str]) -> dict[str, Any]:
    """All numbers of an analysis. Numbers per channel are those of all images and of the pictured classes."""
    layers = []
    for layer in analysis.layers:
        ablation = layer.ablation
        layers.append(
            {
                "name": layer.name,
                **asdict(layer.overall),
                "class_share": layer.class_share,
                "with_fixed_gates": {
                    "accuracy": ablation.accuracy,
                    "change": ablation.change.value,
                    "change_half_width": ablation.change.half_width,
                    "harmless": ablation.harmless,
                },
                "by_class": {
                    name: None if gates is None else asdict(gates)
                    for name, gates in zip(classes, layer.by_class, strict=True)
                },
                "channel_means": _rounded(layer.channel_means),
                "channel_stds": _rounded(layer.channel_stds),
                "channel_means_by_class": {
                    classes[k]: _rounded(layer.class_channel_means[k]) for k in pictured_classes(analysis)
                },
            }
        )
    return {"num_images": analysis.num_images, "accuracy": analysis.accuracy, "layers": layers}


def _rounded(values: Any) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
