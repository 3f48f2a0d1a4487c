"""Rounding of the arrays outside of variational and quantised layers, such as norms and positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.layers import is_layer
from bcdl_jax.graph.program import dtype_of


def round_plain_arrays(params: PyTree, bits: int) -> PyTree:
    """Rounds each floating-point array outside of the layers to multiples of a power of two.

    The step is the smallest power of two with which integers of this many bits hold the largest element of the array. The arrays keep their
    types, and ``save`` stores the integers.

    Args:
      params: A tree with variational or quantised layers, which do not change, and other arrays. Arrays with values that are not finite, or
        almost too large for their type, do not change either.
      bits: The number of bits of the integers with their sign, from 2 to 16.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: ``bits`` is out of range.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits is {bits}; it must be from 2 to 16.")
    largest = 2 ** (bits - 1) - 1

    def rounded(node: PyTree) -> PyTree:
        if is_layer(node) or not jnp.issubdtype(dtype_of(node), jnp.floating):
            return node
        array = np.asarray(node)
        wide = array.astype(np.float64)
        peak = float(np.max(np.abs(wide), initial=0))
        if not peak or not np.isfinite(peak):  # Such as a mask of minus infinity.
            return node
        exponent = int(np.ceil(np.log2(peak / largest)))
        # A sum with 0 turns -0 into 0.
        values = np.ldexp(np.round(np.ldexp(wide, -exponent)), exponent) + 0.0
        if np.max(np.abs(values)) > float(jnp.finfo(array.dtype).max):
            return node
        return jnp.asarray(values.astype(array.dtype))

    return jax.tree.map(rounded, params, is_leaf=is_layer)
