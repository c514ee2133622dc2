"""The sections of a report, each from plain data to HTML. A section with nothing to tell is an empty string."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from composer_se.gates.observe import NEAR
from composer_se.report.page import section, table
from composer_se.report.picture import Series, line_plot

if TYPE_CHECKING:
    from composer_se.planning import Plan

__all__ = ["cost", "curves", "gates_after_training", "gates_in_training", "outcome", "plan_of", "recipe_text"]

Lines = list[dict[str, Any]]


def outcome(summary: dict[str, Any] | None) -> str:
    """The figures of `summary.json`."""
    if summary is None:
        return section("Outcome", '<p class="quiet">The run is not complete yet.</p>')
    metrics = {name.rpartition("/")[2]: value for name, value in summary["metrics"].items()}
    added, total = summary["squeeze_excite_parameters"], summary["parameters"]
    facts = {
        "held-out accuracy": _format(metrics.get("MulticlassAccuracy"), "{:.2%}"),
        "held-out cross entropy": _format(metrics.get("CrossEntropy"), "{:.4f}"),
        "epochs": f"{summary['epoch']:,}",
        "batches": f"{summary['batch']:,}",
        "SE layers": f"{summary['squeeze_excite_layers']:,}",
        "parameters": f"{total:,}",
        "of these SE": f"{added:,}" + (f" (+{added / (total - added):.1%})" if added else ""),
        "wall time": _duration(summary["wall_seconds"]),
    }
    items = "".join(
        f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>" for name, value in facts.items() if value
    )
    return section("Outcome", f'<dl class="facts">{items}</dl>')


def curves(lines: Lines) -> str:
    """Loss, accuracy and learning rate over batches."""
    loss = _series(lines, "loss/train/total")
    accuracy = {
        "training": _series(lines, "metrics/train/MulticlassAccuracy"),
        "held-out": _series(lines, "metrics/eval/MulticlassAccuracy"),
    }
    accuracy = {label: (x, [100 * value for value in y]) for label, (x, y) in accuracy.items() if x}
    rates = {
        key: _series(lines, key) for key in dict.fromkeys(k for line in lines for k in line) if key.startswith("lr-")
    }
    plots = []
    if loss[0]:
        plots.append(line_plot("Training loss", "cross entropy (nats)", {"training": loss}))
    if accuracy:
        plots.append(line_plot("Accuracy", "accuracy (%)", accuracy))
    if rates:
        plots.append(line_plot("Learning rate", "learning rate", rates))
    return section("Curves", _figures(plots)) if plots else ""


def gates_in_training(lines: Lines) -> str:
    """What `GateMonitor` logged: two plots over batches, and the last numbers of each layer."""
    layers = _logged_layers(lines)
    if not layers:
        return ""
    plots = [
        line_plot(
            title,
            y_label,
            {layer: _series(lines, f"gates/{statistic}/{layer}") for layer in layers},
            by_depth=True,
        )
        for statistic, title, y_label in (
            ("mean", "Mean gate of each layer", "mean gate"),
            ("std_over_samples", "How far gates vary with the image", "std over images"),
        )
    ]
    statistics = {
        "mean": "{:.3f}",
        "std_over_samples": "{:.4f}",
        "std_over_channels": "{:.4f}",
        "share_near_0": "{:.1%}",
        "share_near_1": "{:.1%}",
    }
    last = {
        layer: [_format(_series(lines, f"gates/{name}/{layer}")[1][-1], form) for name, form in statistics.items()]
        for layer in layers
    }
    head = ("layer", "mean", "std over images", "std over channels", f"below {NEAR}", f"above {1 - NEAR}")
    text = (
        "Of the training batches that were observed. A layer whose gates do not vary with the image scales its "
        "channels by fixed numbers, and gates near 0 or 1 hardly learn. Colours run from the first layer to the last."
    )
    return section(
        "Gates while training",
        f'<p class="quiet">{text}</p>',
        _figures(plots),
        "<p>The last observed batch:</p>",
        table(head, [[layer, *cells] for layer, cells in last.items()]),
    )


def gates_after_training(analysis: dict[str, Any] | None, picture: str | None) -> str:
    """What `composer-se gates` found."""
    if analysis is None:
        return ""
    head = ("layer", "mean", "std over images", "class explains", "accuracy with fixed gates", "change (points)")
    rows, marked = [], []
    for layer in analysis["layers"]:
        fixed = layer["with_fixed_gates"]
        change = f"{100 * fixed['change']:+.2f} ± {100 * fixed['change_half_width']:.2f}"
        rows.append(
            [
                layer["name"],
                f"{layer['mean']:.3f}",
                f"{layer['std_over_samples']:.4f}",
                f"{layer['class_share']:.0%}",
                f"{fixed['accuracy']:.2%}",
                change,
            ]
        )
        marked.append(not fixed["harmless"])
    text = (
        f"On {analysis['num_images']:,} held-out images of {escape(analysis['data'])}, with an accuracy of "
        f"{analysis['accuracy']:.2%}. Marked: layers whose gates, fixed at their means, cost more accuracy than two "
        "standard errors."
    )
    image = f'<figure class="wide"><img alt="Gates by class and layer" src="{picture}"></figure>' if picture else ""
    return section("Gates after training", image, f'<p class="quiet">{text}</p>', table(head, rows, marked))


def plan_of(plan: Plan | None) -> str:
    """Which convs have SE, and why the others do not."""
    if plan is None:
        return section("Plan", '<p class="quiet">The recipe has no Squeeze-and-Excitation.</p>')
    head = ("conv", "number", "channels", "map", "SE width", "weights each", "multiply-adds each", "")
    rows = []
    for conv in plan.grouped():
        rows.append(
            [
                conv.name,
                str(conv.num_convs),
                f"{conv.in_channels} → {conv.out_channels}",
                "×".join(map(str, conv.map_size)) if conv.map_size else "",
                str(conv.latent_channels or ""),
                f"{conv.added_parameters:,}" if conv.chosen else "",
                f"{conv.added_multiply_adds:,}" if conv.chosen else "",
                "" if conv.chosen else conv.reason,
            ]
        )
    totals = "".join(f"<p>{escape(line)}</p>" for line in (*plan.summary(), *plan.notes))
    return section("Plan", totals, table(head, rows, [conv.chosen for conv in plan.grouped()]))


def cost(study: dict[str, Any] | None) -> str:
    """What `composer-se cost` measured."""
    if study is None:
        return ""
    kinds = list(study["rows"][0]["times"])
    head = ("", "SE layers", "parameters", "multiply-adds", "saved for backward", *kinds)
    rows = []
    for row in study["rows"]:
        cells = [row["name"], str(len(row["layers"]) or "")]
        for key, scale, unit in (("parameters", 1e6, " M"), ("multiply_adds", 1e6, " M"), ("saved_bytes", 1e6, " MB")):
            cells.append(f"{row[key] / scale:,.2f}{unit} (×{row['ratios'][key]:.3f})")
        for kind in kinds:
            time = row["times"][kind]
            ratio = time.get("ratio")
            times = f" (×{ratio['value']:.3f} ± {ratio['resolution']:.3f})" if ratio and ratio["value"] else ""
            cells.append(f"{time['milliseconds']:.4g} ms{times}")
        rows.append(cells)
    settings = study["settings"]
    text = (
        f"{study['network']}: batch {settings['batch_size']}, {settings['image_size']}² pixels, "
        f"{settings['precision']}, {settings['device']}. × is the ratio to the plain network, ± what the measurement "
        "can resolve."
    )
    return section("Cost", f'<p class="quiet">{escape(text)}</p>', table(head, rows))


def recipe_text(text: str) -> str:
    """The resolved recipe."""
    return section("Recipe", f"<details><summary>recipe.yaml</summary><pre>{escape(text)}</pre></details>")


def _figures(plots: list[str]) -> str:
    return '<div class="figures">' + "".join(f"<figure>{plot}</figure>" for plot in plots) + "</div>"


def _series(lines: Lines, key: str) -> Series:
    points = [(line["batch"], line[key]) for line in lines if line.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _logged_layers(lines: Lines) -> list[str]:
    prefix = "gates/mean/"
    keys = (key for line in lines for key, value in line.items() if value is not None)
    return list(dict.fromkeys(key.removeprefix(prefix) for key in keys if key.startswith(prefix)))


def _format(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
