"""A data set: training, validation and test images with their labels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from experiments.runtime.errors import UserError

PARTS = ("train", "validation", "test")
_CHUNK_SIZE = 2500


class Unavailable(Exception):
    """A full data set can neither be read nor prepared. The message is the reason."""


@dataclasses.dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
      images: The images, [n, height, width, channels] of uint8.
      labels: The classes of the images, [n] of int32.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in three parts.

    Attributes:
      name: The name of the loaded data in the table of the data sets.
      train: The training images.
      validation: The validation images, for the choice of thresholds and steps.
      test: The test images.
      notice: One sentence if another data set was requested, else None.
      remark: One sentence if the images differ from the original ones, else None.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    notice: str | None = None
    remark: str | None = None

    def summary(self) -> dict[str, Any]:
        """The name, the size of each part, and the notice and the remark where there is one."""
        sizes = {part: len(getattr(self, part)) for part in PARTS}
        sentences = {name: getattr(self, name) for name in ("notice", "remark") if getattr(self, name)}
        return {"name": self.name} | sizes | sentences

    def padded_to(self, shape: tuple[int, int, int]) -> Dataset:
        """The data set with images of the given shape: an even margin of zeros is added, and the one channel is repeated.

        Args:
          shape: The shape of the images that the network takes, (height, width, channels).

        Returns:
          The padded data set, or this one if its images already have the shape.

        Raises:
          UserError: The images are larger than ``shape``.
        """
        given = self.train.images.shape[1:]
        if given == shape:
            return self
        if any(size > most for size, most in zip(given, shape, strict=True)):
            raise UserError(f"The images of {self.name} are {_sizes(given)}; the network takes {_sizes(shape)}.")
        train, validation, test = (_pad(getattr(self, part), shape) for part in PARTS)
        return dataclasses.replace(self, train=train, validation=validation, test=test)


def chunks(count: int) -> list[slice]:
    """The slices that divide ``count`` images into chunks, since the activations of all images at once may take gigabytes."""
    return [slice(first, first + _CHUNK_SIZE) for first in range(0, count, _CHUNK_SIZE)]


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _pad(split: Split, shape: tuple[int, int, int]) -> Split:
    height, width, channels = split.images.shape[1:]
    margins = [
        ((full - size) // 2, full - size - (full - size) // 2) for size, full in ((height, shape[0]), (width, shape[1]))
    ]
    images = np.pad(split.images, [(0, 0), *margins, (0, 0)])
    return Split(np.repeat(images, shape[2] // channels, axis=-1), split.labels)
