"""Shapes of arrays that broadcast."""

from __future__ import annotations

import jax


def of_rank(array: jax.Array, rank: int) -> jax.Array:
    """The array with leading axes of size 1 up to this rank.

    It broadcasts against arrays of the rank without an implicit promotion, which ``jax_numpy_rank_promotion`` may forbid.
    """
    return array.reshape((1,) * (rank - array.ndim) + array.shape)
