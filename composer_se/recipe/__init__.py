"""Recipes: YAML files that describe one training run, from the file on disk to the Trainer."""
