"""The difference between computed and expected arrays, which the checks compare with a tolerance."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def relative_difference(found: Any, expected: Any) -> float:
    """The largest max |a - b| / max |b| of all pairs of arrays of two trees, with a of ``found`` and b of ``expected``.

    Returns:
      The difference; infinity for a NaN in any array, for other shapes and for another number of arrays.
    """
    pairs = [[np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (found, expected)]
    if [array.shape for array in pairs[0]] != [array.shape for array in pairs[1]]:
        return float("inf")
    differences = [_of_arrays(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(*pairs, strict=True)]
    # Python's ``max`` loses a NaN that is not the first element, NumPy's does not.
    largest = float(np.max(differences, initial=0.0))
    return float("inf") if np.isnan(largest) else largest


def _of_arrays(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):  # The difference of two infinities is NaN.
        return np.abs(a - b).max(initial=0.0) / np.abs(b).max(initial=1e-30)
