"""Finds the blocks that a trained network can do without, for `composer-se slim`."""
