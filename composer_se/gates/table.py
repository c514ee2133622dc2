"""An analysis as a table for the terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from composer_se.gates.analysis import Analysis
from composer_se.gates.picture import pictured_classes
from composer_se.recipe.trained import Trained

__all__ = ["as_json", "print_analysis"]


def print_analysis(trained: Trained, analysis: Analysis, console: Console) -> None:
    """Prints a line per layer, and which layers could lose their block."""
    table = Table(
        title=f"Gates of {trained.name} on {analysis.num_images:,} images of {trained.data}",
        caption=(
            "std: how far a channel's gate varies over images, and how far channels differ. near: share of gates below "
            "0.05 and above 0.95. class: share of the variance over images that the class explains. fixed: change of "
            "the accuracy, in percentage points ± standard error, when the layer's gates are fixed at their means."
        ),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        padding=(0, 1, 0, 0),
    )
    table.add_column("layer", overflow="fold")
    for head in ("mean", "std\nimages", "std\nchannels", "near\n0", "near\n1", "class", "fixed"):
        table.add_column(head, justify="right", no_wrap=True)
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
            f"{100 * ablation.change:+.2f} ± {100 * ablation.standard_error:.2f}",
            style="dim" if ablation.harmless else "",
        )
    console.print(table)
    console.print(f"Accuracy with all gates: {analysis.accuracy:.2%}", highlight=False)
    spare = sorted((layer for layer in analysis.layers if layer.ablation.harmless), key=lambda x: -x.ablation.change)
    if spare:
        names = ", ".join(layer.name for layer in spare)
        console.print(
            f"Each of these {len(spare)} could have its gates fixed, alone, without harm to the accuracy beyond two "
            f"standard errors; best first: {names}. To train without them, give their names to exclude.",
            highlight=False,
        )


def as_json(trained: Trained, analysis: Analysis) -> dict[str, Any]:
    """All numbers of an analysis. Channel by channel they are given for all images and for the pictured classes."""
    names = [trained.classes[k] if trained.classes else str(k) for k in range(len(analysis.layers[0].by_class))]
    pictured = pictured_classes(analysis)
    layers = []
    for layer in analysis.layers:
        layers.append(
            {
                "name": layer.name,
                **asdict(layer.overall),
                "class_share": layer.class_share,
                "with_fixed_gates": {**asdict(layer.ablation), "harmless": layer.ablation.harmless},
                "by_class": {
                    name: None if gates is None else asdict(gates)
                    for name, gates in zip(names, layer.by_class, strict=True)
                },
                "channel_means": _rounded(layer.channel_means),
                "channel_stds": _rounded(layer.channel_stds),
                "channel_means_by_class": {names[k]: _rounded(layer.class_channel_means[k]) for k in pictured},
            }
        )
    return {
        "name": trained.name,
        "checkpoint": str(trained.checkpoint),
        "data": trained.data,
        "num_images": analysis.num_images,
        "accuracy": analysis.accuracy,
        "layers": layers,
    }


def _rounded(values: Any) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
