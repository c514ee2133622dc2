"""A study as tables for the terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from composer_se.cost.layers import BUILT_IN, NORM, OURS, LayerTimes
from composer_se.cost.study import Study
from composer_se.cost.variants import PLAIN, Variant
from composer_se.measure.uncertainty import Interval
from composer_se.show.terminal import new_table
from composer_se.show.text import plural

__all__ = ["as_dict", "conditions", "print_study"]

# With a line break, so that the tables fit 80 columns.
_SETTING = "min_\nchannels"


def print_study(study: Study, console: Console) -> None:
    """Prints the settings, the machine, all tables and the notes."""
    console.print(f"[bold]{study.network}[/bold]: {conditions(study)}", highlight=False)
    console.print(str(study.machine), highlight=False)
    console.print(_counts_table(study))
    console.print(_times_table(study))
    if study.settings.against_composer:
        console.print(_against_table(study))
    if study.layers is not None:
        for mode in study.layers.seconds:
            console.print(_layers_table(study.layers, mode))
    for note in study.notes:
        console.print(f"Note: {note}", highlight=False)


def conditions(study: Study) -> str:
    """The settings of the measurement, in words."""
    settings = study.settings
    parts = [f"batch {settings.batch_size}", f"{settings.image_size}² pixels", settings.precision, str(settings.device)]
    parts += ["channels last"] * settings.channels_last + ["compiled"] * settings.compiled
    parts += [f"{key} {value}" for key, value in settings.shared_options().items()]
    parts += [plural(settings.instances, "instance"), plural(settings.rounds, "round")]
    return ", ".join(parts)


def _counts_table(study: Study) -> Table:
    compiled = study.settings.compiled
    caption = (
        "Exact counts. Multiply-adds: one image, forward. Saved: for the backward pass of one batch, the images "
        "among it, parameters and buffers not."
    )
    if not compiled:
        caption += " Passes: reads and writes of memory as large as the conv's output, per SE layer and step."
    plain = study.counts[PLAIN]
    heads = ["SE\nlayers", "parameters", "multiply-\nadds", "saved"]
    heads += [] if compiled else ["passes"]
    heads += [] if plain.peak_bytes is None else ["peak\nmemory"]
    table = new_table("What it needs (× plain)", caption, _SETTING, heads)
    for variant in study.variants:
        counts = study.counts[variant.name]
        cells = [
            str(len(variant.layers)) if variant.layers else "-",
            _beside_plain(counts.parameters, plain.parameters, ""),
            _beside_plain(counts.multiply_adds, plain.multiply_adds, ""),
            _beside_plain(counts.saved_bytes, plain.saved_bytes, "B"),
        ]
        if not compiled:
            cells.append(_span(counts.passes))
        if counts.peak_bytes is not None and plain.peak_bytes is not None:
            cells.append(_beside_plain(counts.peak_bytes, plain.peak_bytes, "B"))
        table.add_row(variant.name, *cells)
    return table


def _times_table(study: Study) -> Table:
    table = new_table(
        "What it takes (× plain ± noise)",
        "Noise: two copies of one network differ by up to this much (95 %). Within it no difference is shown.",
        _SETTING,
        list(study.seconds),
    )
    for variant in study.variants:
        cells = [f"{1e3 * levels.seconds(variant.name):.4g} ms" for levels in study.levels.values()]
        if variant.name != PLAIN:
            ratios = (levels.ratio(variant.name, PLAIN) for levels in study.levels.values())
            cells = [f"{cell}\n{ratio}" for cell, ratio in zip(cells, ratios, strict=True)]
        table.add_row(variant.name, *cells)
    return table


def _against_table(study: Study) -> Table:
    table = new_table(
        "Ours over Composer's built-in (± noise): time, and below it overhead",
        "Same convs, same widths. Overhead: time over plain less 1. Not resolved: the built-in is not slower than "
        "plain beyond the noise.",
        _SETTING,
        list(study.seconds),
    )
    for setting, of_kind in _against_composer(study).items():
        table.add_row(setting, *(f"{time}\n{overhead}" for time, overhead in of_kind.values()))
    return table


def _against_composer(study: Study) -> dict[str, dict[str, tuple[Interval, Interval]]]:
    """By setting and kind of step: our time and our overhead, each divided by the built-in's on the same convs."""
    return {
        str(ours.min_channels): {
            kind: (levels.ratio(ours.name, theirs.name), levels.overhead(ours.name, theirs.name, PLAIN))
            for kind, levels in study.levels.items()
        }
        for ours, theirs in zip(study.of_code("composer-se"), study.of_code("composer"), strict=True)
    }


def _layers_table(times: LayerTimes, mode: str) -> Table:
    variants = _shown(times, mode)
    table = new_table(
        f"Layer by layer, {mode}: milliseconds",
        "The norm alone, and what SE adds to it; medians over rounds in random order. The conv is not run. In the sum "
        "each layer counts as often as the network has it; a share is followed by its 95 % interval.",
        "map",
        ["×", "width", "norm", *(f"+ {variant}" for variant in variants[1:])],
    )
    for i, kind in enumerate(times.kinds):
        cells = [f"{times.milliseconds(mode, variant, i):.2f}" for variant in variants]
        shape = f"{kind.channels}×{kind.height}×{kind.width}" + ("" if kind.norm != "none" else ", no norm")
        table.add_row(shape, str(kind.count), str(kind.latent_channels), *cells)
    sums = [f"{1e3 * median(times.added(mode, variant)):.1f}" for variant in variants[1:]]
    alone = sum(kind.count * times.milliseconds(mode, NORM, i) for i, kind in enumerate(times.kinds))
    table.add_row("sum", str(sum(kind.count for kind in times.kinds)), "", f"{alone:.1f}", *sums, style="bold")
    if BUILT_IN in variants:
        table.add_row("ours over the built-in", "", "", "", times.share(mode).with_spread(), "")
    return table


def _beside_plain(value: int, plain: int, unit: str) -> str:
    """An amount in the plain network's unit (k, M, G), and below it the ratio to the plain network's amount."""
    scale, prefix = next(((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if plain >= s), (1.0, ""))
    amount = f"{value / scale:.2f} {prefix}{unit}"
    return amount if value == plain or not plain else f"{amount}\n{value / plain:.4f}"


def _span(passes: tuple[int, ...]) -> str:
    if not passes:
        return "-"
    low, high = min(passes), max(passes)
    return str(low) if low == high else f"{low} to {high}"


def as_dict(study: Study) -> dict[str, Any]:
    """All results, including the time of every visit."""
    found: dict[str, Any] = {
        "network": study.network,
        "settings": asdict(study.settings)
        | {"device": str(study.settings.device), "squeeze_excite": study.settings.shared_options()},
        "machine": asdict(study.machine),
        "notes": study.notes,
        "rows": [_row(study, variant) for variant in study.variants],
    }
    if study.settings.against_composer:
        found["against_composer"] = [
            {"min_channels": setting}
            | {kind: {"time": _ratio(time), "overhead": _ratio(share)} for kind, (time, share) in of_kind.items()}
            for setting, of_kind in _against_composer(study).items()
        ]
    if study.layers is not None:
        found["layers"] = _layers_as_dict(study.layers)
    return found | {"seconds": study.seconds}


def _row(study: Study, variant: Variant) -> dict[str, Any]:
    counts, plain = asdict(study.counts[variant.name]), asdict(study.counts[PLAIN])
    exact = ("parameters", "multiply_adds", "saved_bytes", "peak_bytes")
    times: dict[str, dict[str, Any]] = {}
    for kind, levels in study.levels.items():
        times[kind] = {"milliseconds": 1e3 * levels.seconds(variant.name)}
        if variant.name != PLAIN:
            times[kind]["ratio"] = _ratio(levels.ratio(variant.name, PLAIN))
    return {
        "name": variant.name,
        "code": variant.code,
        "min_channels": variant.min_channels,
        "layers": list(variant.layers),
        **counts,
        "ratios": {key: counts[key] / plain[key] for key in exact if counts[key] and plain[key]},
        "times": times,
    }


def _layers_as_dict(times: LayerTimes) -> dict[str, Any]:
    modes = {}
    for mode in times.seconds:
        variants = _shown(times, mode)
        modes[mode] = {
            "milliseconds": {
                variant: [times.milliseconds(mode, variant, i) for i in range(len(times.kinds))] for variant in variants
            },
            "added": {variant: times.added(mode, variant) for variant in variants[1:]},
            "share": asdict(times.share(mode)) if BUILT_IN in variants else None,
        }
    return {"kinds": [asdict(kind) for kind in times.kinds], "modes": modes, "seconds": times.seconds}


def _shown(times: LayerTimes, mode: str) -> list[str]:
    return [variant for variant in (NORM, OURS, BUILT_IN) if variant in times.seconds[mode]]


def _ratio(ratio: Interval) -> dict[str, Any]:
    return asdict(ratio) | {"resolution": ratio.half_width, "resolved": ratio.excludes(1)}
