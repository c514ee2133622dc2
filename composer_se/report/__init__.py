"""A run's `report.html`: what was trained, what SE does there and how it went, in one self-contained file."""

from composer_se.report.write import write_report

__all__ = ["write_report"]
