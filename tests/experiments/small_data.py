"""A few of the embedded digits, for runs in tests."""

import numpy as np

from experiments.io import data

# To trace or initialise the LeNets with.
SAMPLE_IMAGES = np.zeros((1, 28, 28, 1), np.uint8)


def few_digits(train: int, validation: int, test: int) -> data.Dataset:
    """So many digits of each part, in random order: the file is sorted by class."""
    whole = data.load("mnist_5k")

    def few(split, count):
        rows = np.random.default_rng(0).permutation(len(split))[:count]
        return data.Split(split.images[rows], split.labels[rows])

    return data.Dataset("mnist_5k", few(whole.train, train), few(whole.validation, validation), few(whole.test, test))
