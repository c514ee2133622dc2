"""Timing code fairly and saying how sure the result is: what `composer-se cost` and `composer-se compare` share."""
