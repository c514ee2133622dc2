"""Measures the cost of Squeeze-and-Excitation on one network and one machine, for `composer-se cost`.

`study.measure` runs all parts. `counts` and `passes` count exactly: parameters, multiply-adds, bytes saved for
backward, passes over the map. `composer_se.measure.timing` times steps, and `levels` computes ratios with intervals.
"""
