"""The recipes of the experiments, as data, each file with its results."""
