"""Files of data that other packages carry, and random splits."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.gallery.entry import Examples, Splits
from experiments.runtime.errors import UserError

_SPLIT_SEED = 0
# The share of the examples that are held out for validation, and for the test.
_HELD_OUT = 0.1


def packaged_file(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported.

    Args:
      package: The name under which the package is imported.
      name: The path of the file within the package.

    Raises:
      UserError: The package has no such file.
    """
    spec = importlib.util.find_spec(package)
    for directory in (spec and spec.submodule_search_locations) or ():
        if (path := Path(directory, name)).is_file():
            return path
    raise UserError(f"The installed package {package} has no file {name}; pip install 'bcdl-jax[gallery]' again.")


def random_rows(count: int) -> list[np.ndarray]:
    """The numbers of the training, validation and test examples: 80, 10 and 10 percent of ``count``, the same at every call."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(count)
    held_out = round(_HELD_OUT * count)
    return [order[2 * held_out :], order[:held_out], order[held_out : 2 * held_out]]


def splits_of(arrays: Sequence[Any], rows: Sequence[np.ndarray]) -> Splits:
    """The splits of arrays of inputs, targets and perhaps masks, for the numbers of the examples of each part."""
    train, validation, test = (Examples(*(array[chosen] for array in arrays)) for chosen in rows)
    return Splits(train, validation, test)
