"""Removes the blocks that a trained network does not need, for `composer-se slim`."""
