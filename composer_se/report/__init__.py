"""Writes a run's `report.html`: recipe, SE layers, curves, gates and outcome in one self-contained file."""
