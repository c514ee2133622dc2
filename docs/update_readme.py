"""Writes the tables of the README from what the Makefile's targets leave beside this file."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from composer_se.measure.machine import Machine
from composer_se.measure.uncertainty import Interval, mean_difference, ratio_of_means

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
RESULTS = DOCS / "results"
KINDS = ("training step", "inference, batch 1", "inference, batch 16")
CLAIMS = (  # folder below results/claims/, the algorithm beside SE, what the row is called
    ("randaugment-data-bound", "RandAugment", "RandAugment, digits, ResNet-8: loader slower than network"),
    ("randaugment-compute-bound", "RandAugment", "RandAugment, digits, ResNet-20: network slower than loader"),
    ("selective-backprop-speed", "SelectiveBackprop", "SelectiveBackprop, Fashion-MNIST, ResNet-8"),
    ("selective-backprop", "SelectiveBackprop", "SelectiveBackprop, digits, ResNet-20"),
)


def cost_table(found: dict[str, Any]) -> str:
    """The table in Markdown, one row per variant, with the machine below it."""
    lines = [
        "| | SE layers | parameters | multiply-adds | saved for backward | full-size passes | "
        + " | ".join(KINDS)
        + " |",
        "|---|" + "---|" * (5 + len(KINDS)),
    ]
    lines += [_row(row) for row in found["rows"]]
    (against,) = found["against_composer"]
    lines.append("")
    lines.append(
        "Ours over Composer's, overhead over plain: "
        + "; ".join(f"{kind} {_ratio(against[kind]['overhead'])}" for kind in KINDS)
        + ". Time: "
        + "; ".join(f"{kind} {_ratio(against[kind]['time'])}" for kind in KINDS)
        + "."
    )
    settings = found["settings"]
    lines.append("")
    lines.append(
        f"ResNet-50, batch {settings['batch_size']}, {settings['image_size']}², {settings['precision']}, "
        f"latent_channels {settings['squeeze_excite']['latent_channels']}, min_channels {against['min_channels']} of "
        f"{settings['squeeze_excite']['min_channels_of']}; {settings['instances']} instances of each, "
        f"{settings['rounds']} rounds; {Machine(**found['machine'])}. "
        "± is what two variants of the same code can differ by; *(within)* means no difference was shown."
    )
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    name = {"plain": "plain", "composer-se": "**composer-se**", "composer": "Composer's built-in"}[row["code"]]
    passes = "/".join(str(count) for count in sorted(set(row["passes"]))) or "–"
    ratios = row["ratios"]
    times = [_ratio(row["times"][kind]["ratio"]) if "ratio" in row["times"][kind] else "1" for kind in KINDS]
    cells = [
        name,
        str(len(row["layers"]) or "–"),
        f"{ratios['parameters']:.3f}",
        f"{ratios['multiply_adds']:.4f}",
        f"{ratios['saved_bytes']:.4f}",
        passes,
        *times,
    ]
    return "| " + " | ".join(cells) + " |"


def _ratio(ratio: dict[str, Any]) -> str:
    values: dict[str, Any] = {field.name: ratio[field.name] for field in fields(Interval)}
    values |= {name: math.nan for name, value in values.items() if value is None}  # JSON knows no NaN
    return str(Interval(**values))


def with_tables(readme: str) -> str:
    """The README with its tables renewed."""
    readme = _replaced(
        readme, "cost", cost_table(json.loads((RESULTS / "cost-resnet50-against-composer.json").read_text()))
    )
    # Its headings would stand beside the README's own.
    tried = (DOCS / "compatibility.md").read_text().partition("\n## ")
    rows = re.sub(r"^## (.*)$", r"**\1**", f"## {tried[2]}", flags=re.MULTILINE)
    readme = _replaced(readme, "compatibility", rows.strip())
    readme = _replaced(readme, "study", study_table((RESULTS / "study" / "results.md").read_text()))
    return _replaced(readme, "claims", claims_table(RESULTS / "claims"))


def study_table(report: str) -> str:
    """The table of a comparison's report, what it decides, and the conditions."""
    table = re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE)[0]
    sentences = re.findall(r"^- .*\n", report, re.MULTILINE)
    decided = [sentence for sentence in sentences if "the most accurate of the arms" not in sentence]
    conditions = re.findall(r"^Recipe .*$", report, re.MULTILINE)[0]
    return f"{table}\n{''.join(decided)}\n{conditions}"


def claims_table(folder: Path) -> str:
    """The time that SE adds to a training step, with and without another algorithm, and the accuracy of both."""
    rows = [
        "| time of a training step, over that of the plain network | SE | the other | both | both over the other |",
        "|---|---|---|---|---|",
    ]
    machine = None
    for name, other, title in CLAIMS:
        kept = json.loads((folder / name / "speeds.json").read_text())
        machine = Machine(**kept["no SE"]["machine"])
        where = f"{machine.threads} torch {'thread' if machine.threads == 1 else 'threads'}, load {machine.load:.1f}"
        steps = {arm: entry["speed"]["step"] for arm, entry in kept.items()}
        pairs = [("SE", "no SE"), (other, "no SE"), (f"SE and {other}", "no SE"), (f"SE and {other}", other)]
        ratios = [ratio_of_means(steps[ours], steps[theirs]) for ours, theirs in pairs]
        rows.append(f"| {title} ({where}) | " + " | ".join(ratio.with_spread() for ratio in ratios) + " |")
    runs = json.loads((folder / "selective-backprop" / "results.json").read_text())["runs"]
    accuracies = {arm: [100 * run["accuracies"][-1][1] for run in of_arm] for arm, of_arm in runs.items()}
    gain = mean_difference(accuracies["SE and SelectiveBackprop"], accuracies["SelectiveBackprop"])
    return "\n".join(
        [
            *rows,
            "",
            "Accuracy of the last row, %: "
            + "; ".join(f"{arm} {mean(values):.2f} ±{stdev(values):.2f}" for arm, values in accuracies.items())
            + f". SE beside SelectiveBackprop: {gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}] points over "
            f"{len(accuracies['SE'])} seeds.",
            "",
            f"SE on all convs; {machine.cpu}, {machine.cpus} CPUs; torch {machine.torch}; {machine.system}.",
        ]
    )


def _replaced(readme: str, name: str, table: str) -> str:
    marked = re.compile(rf"(<!-- {name}: make {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
    if not marked.search(readme):
        raise ValueError(f"README.md has lost the marks around a table, `<!-- {name}: make {name} -->`.")
    return marked.sub(lambda match: match[1] + table + match[2], readme)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
