"""Shapes of arrays that broadcast, and masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def of_rank(array: jax.Array, rank: int) -> jax.Array:
    """The array with leading axes of size 1 up to this rank.

    It broadcasts against arrays of the rank without an implicit promotion, which ``jax_numpy_rank_promotion`` may forbid.
    """
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def in_float32(array: jax.Array) -> jax.Array:
    """The array in float32, or in its own dtype if that is wider. Sums and variances need the range and the precision."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def is_kept(mask: jax.Array) -> jax.Array:
    """The kept entries of a mask, an array of bool. A mask is bool itself, or it holds numbers, of which the positive ones are kept."""
    return mask if mask.dtype == jnp.bool_ else mask > 0
