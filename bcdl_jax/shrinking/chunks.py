"""Processes a large batch in chunks."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bcdl_jax._tree import PyTree


def in_chunks(function: Callable[[PyTree], PyTree], inputs: PyTree, size: int) -> PyTree:
    """Applies a function to chunks of a batch, one after the other. The last chunk may be smaller.

    Args:
      function: A function that treats the examples one by one.
      inputs: A tree of arrays with the batch as their leading axis.
      size: The number of examples in a chunk.
    """
    batch = np.shape(jax.tree.leaves(inputs)[0])[0]
    if batch <= size:
        return function(inputs)
    full = batch // size * size
    stacked = jax.tree.map(lambda leaf: leaf[:full].reshape(-1, size, *leaf.shape[1:]), inputs)
    outputs = jax.tree.map(lambda leaf: leaf.reshape(full, *leaf.shape[2:]), lax.map(function, stacked))
    if full == batch:
        return outputs
    rest = function(jax.tree.map(lambda leaf: leaf[full:], inputs))
    return jax.tree.map(lambda first, last: jnp.concatenate([first, last]), outputs, rest)
