"""The instrument behind `composer-se cost`: what Squeeze-and-Excitation costs on one network and one machine.

`study.measure` runs it all. What is exact (layers, parameters, multiply-adds, bytes saved for backward, passes over
the activation map) is counted in `counts`, `saved` and `passes`; what is not exact (time) is taken in `timing` and
judged in `statistics`.
"""
