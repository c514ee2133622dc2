"""Fair timing and confidence intervals, shared by `composer-se cost` and `composer-se compare`."""
