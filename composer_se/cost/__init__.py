"""The instrument behind `composer-se cost`: what Squeeze-and-Excitation costs on one network and one machine.

`study.measure` runs it all. What is exact (layers, parameters, multiply-adds, bytes saved for backward, passes over
the activation map) is counted in `counts`, `saved` and `passes`; time is measured by
`composer_se.measure.timing` and judged in `levels`.
"""
