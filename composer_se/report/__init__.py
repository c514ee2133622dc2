"""A run's `report.html`: what was trained, what SE does there and how it went, in one self-contained file."""
