"""The table of the data sets: one entry for each. It does not import JAX, so that --help prints at once."""

from __future__ import annotations

import dataclasses

from experiments.io.tfds_builders import CIFAR_ARCHIVE, IDX_FILES, DownloadFormat

MNIST_SHAPE = (28, 28, 1)


@dataclasses.dataclass(frozen=True)
class DatasetEntry:
    """A data set that can be loaded by name.

    Attributes:
      name: The name for ``--dataset`` and results. Downloaded data sets have their names from tensorflow-datasets.
      title: The name in tables.
      shape: The shape of an image, (height, width, channels).
      train: The number of training images, those held out for validation included.
      test: The number of test images.
      validation: The number of training images that are held out for validation.
      download: The form of the downloaded files; None for the embedded digits, which are part of the project.
      title_if_replaced: The name in the notice of a run that uses the embedded digits in its place; None where no run may do so.
    """

    name: str
    title: str
    shape: tuple[int, int, int]
    train: int
    test: int
    validation: int = 5_000
    download: DownloadFormat | None = None
    title_if_replaced: str | None = None


# The embedded digits.
EMBEDDED = "mnist_5k"
_ENTRIES = (
    DatasetEntry("mnist", "MNIST", MNIST_SHAPE, 60_000, 10_000, download=IDX_FILES, title_if_replaced="Full MNIST"),
    DatasetEntry(EMBEDDED, "embedded digits", MNIST_SHAPE, 4_000, 1_000, validation=500),
    DatasetEntry("fashion_mnist", "Fashion-MNIST", MNIST_SHAPE, 60_000, 10_000, download=IDX_FILES),
    DatasetEntry(
        "cifar10", "CIFAR-10", (32, 32, 3), 50_000, 10_000, download=CIFAR_ARCHIVE, title_if_replaced="CIFAR-10"
    ),
)
DATASETS = {entry.name: entry for entry in _ENTRIES}


def names_of_shape(shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The names of the data sets whose images have a shape, in the order of the table."""
    return tuple(entry.name for entry in DATASETS.values() if entry.shape == shape)
