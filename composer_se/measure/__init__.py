"""Fair timing and confidence intervals, for `composer-se cost`, `compare`, `gates` and `slim`."""
