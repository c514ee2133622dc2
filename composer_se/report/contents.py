"""Computes the contents of a report's sections from the files of a run. A section without data is empty."""

from __future__ import annotations

from typing import Any

from composer_se.report.picture import Series, line_plot
from composer_se.show.text import duration

__all__ = ["classes", "cost", "curves", "gates_after_training", "gates_in_training", "outcome"]

_MOST_CLASSES = 100

Lines = list[dict[str, Any]]
Content = dict[str, Any]


def outcome(summary: Content | None) -> dict[str, str]:
    """The figures of `summary.json`, by name."""
    if summary is None:
        return {}
    metrics, added, total = summary["metrics"], summary["squeeze_excite_parameters"], summary["parameters"]
    trained = summary.get("trained", total)  # summaries of earlier versions lack it
    named = (
        ("held-out accuracy", "metrics/eval/MulticlassAccuracy", "{:.2%}"),
        ("held-out cross entropy", "metrics/eval/CrossEntropy", "{:.4f}"),
        ("last training loss", "loss/train/total", "{:.4f}"),
        ("images per second", "throughput/samples_per_sec", "{:.1f}"),
    )
    measured = {word: (metrics[key], form) for word, key, form in named if key in metrics}
    return {
        **{word: "not finite" if value is None else form.format(value) for word, (value, form) in measured.items()},
        "epochs": f"{summary['epoch']:,}",
        "batches": f"{summary['batch']:,}",
        "SE layers": f"{summary['squeeze_excite_layers']:,}",
        "parameters": f"{total:,}",
        "of these SE": f"{added:,}" + (f" (+{added / (total - added):.2%})" if added else ""),
        **({"of these trained": f"{trained:,} ({trained / total:.2%})"} if trained < total else {}),
        "wall time": duration(summary["wall_seconds"]),
    }


def classes(names: list[str] | None) -> str:
    """The names of the first 100 classes, and the number of the others."""
    shown, more = (names or [])[:_MOST_CLASSES], len(names or []) - _MOST_CLASSES
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def curves(lines: Lines) -> list[str]:
    """Plots of loss, accuracy and learning rate over batches."""
    accuracy = {
        label: (x, [100 * value for value in y])
        for label, key in (("training", "train"), ("held-out", "eval"))
        for x, y in [_series(lines, f"metrics/{key}/MulticlassAccuracy")]
    }
    rates = dict.fromkeys(key for line in lines for key in line if key.startswith("lr-"))
    plots = (
        ("Training loss", "cross entropy (nats)", {"training": _series(lines, "loss/train/total")}),
        ("Accuracy", "accuracy (%)", accuracy),
        ("Learning rate", "learning rate", {key: _series(lines, key) for key in rates}),
    )
    drawn = ((title, label, {name: s for name, s in series.items() if s[0]}) for title, label, series in plots)
    return [line_plot(title, label, series) for title, label, series in drawn if series]


def gates_in_training(lines: Lines) -> Content:
    """The log of `GateMonitor`: two plots over batches, and the last numbers of each layer."""
    prefix = "gates/mean/"
    keys = (key for line in lines for key, value in line.items() if value is not None)
    layers = list(dict.fromkeys(key.removeprefix(prefix) for key in keys if key.startswith(prefix)))
    if not layers:
        return {}
    plotted = (
        ("mean", "Mean gate of each layer", "mean gate"),
        ("std_over_samples", "How far gates vary with the image", "std over images"),
    )
    columns = {
        "mean": ("mean", "{:.3f}"),
        "std_over_samples": ("std over images", "{:.4f}"),
        "std_over_channels": ("std over channels", "{:.4f}"),
        "share_near_0": ("near 0", "{:.1%}"),
        "share_near_1": ("near their limit", "{:.1%}"),
    }

    def last(layer: str, statistic: str) -> float:
        return _series(lines, f"gates/{statistic}/{layer}")[1][-1]

    return {
        "plots": [
            line_plot(
                title,
                label,
                {layer: _series(lines, f"gates/{statistic}/{layer}") for layer in layers},
                by_depth=True,
            )
            for statistic, title, label in plotted
        ],
        "head": ["layer", *(head for head, _ in columns.values())],
        "rows": [[layer, *(form.format(last(layer, key)) for key, (_, form) in columns.items())] for layer in layers],
    }


def gates_after_training(analysis: Content | None, picture: str | None) -> Content:
    """The table and the picture of `composer-se gates`."""
    if analysis is None:
        return {}
    rows, marked = [], []
    for i, layer in enumerate(analysis["layers"]):
        fixed = layer["with_fixed_gates"]
        # Older files have a standard error.
        half_width = fixed.get("change_half_width", 2 * fixed.get("standard_error", 0))
        rows.append(
            [
                layer["name"],
                f"{layer['mean']:.3f}",
                f"{layer['std_over_samples']:.4f}",
                f"{layer['class_share']:.0%}",
                f"{fixed['accuracy']:.2%}",
                f"{100 * fixed['change']:+.2f} ± {100 * half_width:.2f}",
            ]
        )
        marked += [] if fixed["harmless"] else [i]
    return {
        "images": f"{analysis['num_images']:,}",
        "data": analysis["data"],
        "accuracy": f"{analysis['accuracy']:.2%}",
        "picture": picture,
        "head": ("layer", "mean", "std over images", "class explains", "accuracy with fixed gates", "change (points)"),
        "rows": rows,
        "marked": marked,
    }


def cost(study: Content | None) -> Content:
    """The table of a `composer-se cost` study; empty without a study."""
    if study is None:
        return {}
    kinds = list(study["rows"][0]["times"])
    rows = []
    for row in study["rows"]:
        cells = [row["name"], str(len(row["layers"]) or "")]
        for key, unit in (("parameters", "M"), ("multiply_adds", "M"), ("saved_bytes", "MB")):
            cells.append(f"{row[key] / 1e6:,.2f} {unit} (×{row['ratios'][key]:.3f})")
        for kind in kinds:
            time = row["times"][kind]
            ratio = time.get("ratio")
            times = f" (×{ratio['value']:.3f} ± {ratio['resolution']:.3f})" if ratio and ratio["value"] else ""
            cells.append(f"{time['milliseconds']:.4g} ms{times}")
        rows.append(cells)
    settings = study["settings"]
    return {
        "conditions": f"{study['network']}: batch {settings['batch_size']}, {settings['image_size']}² pixels, "
        f"{settings['precision']}, {settings['device']}",
        "head": ("", "SE layers", "parameters", "multiply-adds", "saved for backward", *kinds),
        "rows": rows,
    }


def _series(lines: Lines, key: str) -> Series:
    points = [(line["batch"], line[key]) for line in lines if line.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]
