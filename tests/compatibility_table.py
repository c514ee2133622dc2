"""Prints the compatibility table of a JUnit report: `python tests/compatibility_table.py REPORT`.

A row is what a test records as ``row``, or the first line of its docstring, counted over its parameters. What it
records as ``note`` explains the row.
The exit code is 1 when a test failed.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field

HEADINGS = {
    "test_compat_models": "Models: a forward and a backward pass with default settings, and a step of every SE weight",
    "test_compat_algorithms": "Composer's algorithms, SE first and last: trained, saved, resumed to the same weights",
    "test_compat_distributed": "Several processes",
    "test_compat_export": "Out of training",
}


@dataclass
class Row:
    """One line of the table."""

    passed: int = 0
    skipped: int = 0
    failed: int = 0
    notes: dict[str, None] = field(default_factory=dict)  # in order, each once

    def markdown(self, title: str) -> str:
        outcome = f"**{self.failed} failed**" if self.failed else "works" if self.passed else "not tried"
        counts = f"{self.passed}" + (f" ({self.skipped} skipped)" if self.skipped else "")
        return f"| {title} | {outcome} | {counts} | {'; '.join(self.notes)} |"


def read(report: str) -> dict[str, dict[str, Row]]:
    """The rows by test file and title, in the order of the report."""
    table: dict[str, dict[str, Row]] = {name: {} for name in HEADINGS}
    for case in ET.parse(report).iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2]
        properties = [(item.get("name"), item.get("value", "")) for item in case.iter("property")]
        titles = [value for name, value in properties if name == "row"]
        if file not in table or not titles:
            continue
        row = table[file].setdefault(titles[-1], Row())
        row.notes |= {value: None for name, value in properties if name == "note"}
        skipped = case.find("skipped")
        if skipped is not None:
            row.skipped += 1
            row.notes[skipped.get("message", "")] = None
        elif case.find("failure") is not None or case.find("error") is not None:
            row.failed += 1
        else:
            row.passed += 1
    return table


def main(report: str) -> int:
    """Prints the table of a report."""
    table = read(report)
    print("# What SE was tried with\n")
    print("Generated from the test results by `make compatibility`. A case is one model, one order of algorithms, one")
    print("export; what it has to do stands in the test.")
    for file, rows in table.items():
        print(f"\n## {HEADINGS[file]}\n\n`tests/{file}.py`\n\n| what | outcome | cases | remarks |\n|---|---|---|---|")
        for title, row in rows.items():
            print(row.markdown(title))
    return int(any(row.failed for rows in table.values() for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
