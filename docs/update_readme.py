"""Writes the tables of the README from what the Makefile's targets leave beside this file."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from composer_se.cost.machine import Machine
from composer_se.cost.statistics import Ratio

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
RESULTS = DOCS / "cost-resnet50-against-composer.json"
KINDS = ("training step", "inference, batch 1", "inference, batch 16")


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
    values: dict[str, Any] = {field.name: ratio[field.name] for field in fields(Ratio)}
    values |= {name: math.nan for name, value in values.items() if value is None}  # JSON knows no NaN
    return str(Ratio(**values))


def with_tables(readme: str) -> str:
    """The README with its tables renewed."""
    readme = _replaced(readme, "cost", cost_table(json.loads(RESULTS.read_text())))
    # Its headings would stand beside the README's own.
    tried = (DOCS / "compatibility.md").read_text().partition("\n## ")
    rows = re.sub(r"^## (.*)$", r"**\1**", f"## {tried[2]}", flags=re.MULTILINE)
    readme = _replaced(readme, "compatibility", rows.strip())
    return _replaced(readme, "study", study_table((DOCS / "study" / "results.md").read_text()))


def study_table(report: str) -> str:
    """The table of a comparison's report, what it decides, and the conditions."""
    table = re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE)[0]
    decided = re.findall(r"(?:^- .*\n)+", report, re.MULTILINE)[0]
    conditions = re.findall(r"^Recipe .*$", report, re.MULTILINE)[0]
    return f"{table}\n{decided}\n{conditions}"


def _replaced(readme: str, name: str, table: str) -> str:
    marked = re.compile(rf"(<!-- {name}: make {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
    if not marked.search(readme):
        raise ValueError(f"README.md has lost the marks around a table, `<!-- {name}: make {name} -->`.")
    return marked.sub(lambda match: match[1] + table + match[2], readme)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
