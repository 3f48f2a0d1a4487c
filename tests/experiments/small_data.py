"""A small part of the embedded digits, for runs in tests."""

import numpy as np

from experiments.io import data

# A batch for tracing and initialising the LeNets.
SAMPLE_IMAGES = np.zeros((1, 28, 28, 1), np.uint8)


def few_digits(train: int, validation: int, test: int) -> data.Dataset:
    """The data set with the given numbers of digits. They are chosen at random, since the file is sorted by class."""
    whole = data.load("mnist_5k")

    def few(split, count):
        rows = np.random.default_rng(0).permutation(len(split))[:count]
        return data.Split(split.images[rows], split.labels[rows])

    return data.Dataset("mnist_5k", few(whole.train, train), few(whole.validation, validation), few(whole.test, test))
