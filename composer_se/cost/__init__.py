"""The work behind `composer-se cost`: the cost of Squeeze-and-Excitation on one network and one machine.

`study.measure` runs it all. `counts` and `passes` count exactly: layers, parameters, multiply-adds, bytes
saved for backward, passes over the map. `composer_se.measure.timing` measures time, and `levels` judges it.
"""
