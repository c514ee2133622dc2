"""What a recipe names: networks with their weights, data sets, and the components of a training run."""
