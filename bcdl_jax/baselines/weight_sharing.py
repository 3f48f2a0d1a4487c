"""Weight sharing: k-means clusters the weights of each layer, so that they share a few values [H16 section 3].

A plain network that was pruned weight by weight, with ``masks`` (see ``magnitude``), becomes a file through its variational twin. The twin
``model`` has layers of the family ``SparseVariationalDropout()`` with the same names:

    fresh = model.init(key, inputs)["params"]
    variational = bcdl_jax.from_trained(fresh, params)
    pruned = bcdl_jax.compression.prune_units(variational, bcdl_jax.baselines.kernels_by_layer(masks), chain)
    assignments, levels = bcdl_jax.baselines.share_weights(pruned, 32)
    bcdl_jax.save("model.bcdl", bcdl_jax.baselines.reduce_to_levels(pruned, assignments, levels))
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, values_by_layer
from bcdl_jax.priors.posterior import variational_layers


@functools.partial(jax.jit, static_argnums=2)
def cluster_values(values: jax.Array, keep: jax.Array, count: int, iterations: int = 50) -> jax.Array:
    """The centres of k-means over some values. They start at equal distances between the extremes [H16 section 3.2].

    Args:
      values: Values of any shape.
      keep: An array of bool that broadcasts against ``values``: True for the values that count.
      count: The number of centres.
      iterations: The number of iterations of Lloyd's algorithm.

    Returns:
      The centres in ascending order, [count]. A centre that is the nearest one to no value keeps its position.
    """
    values, keep = values.ravel(), jnp.broadcast_to(keep, values.shape).ravel()
    low = jnp.min(values, where=keep, initial=jnp.inf)
    high = jnp.max(values, where=keep, initial=-jnp.inf)
    start = jnp.where(jnp.any(keep), jnp.linspace(low, high, count), 0.0).astype(values.dtype)

    def improve(_: jax.Array, centres: jax.Array) -> jax.Array:
        nearest = _nearest_level(values, centres)
        sizes = jax.ops.segment_sum(keep.astype(values.dtype), nearest, count)
        sums = jax.ops.segment_sum(jnp.where(keep, values, 0), nearest, count)
        return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1), centres)

    return jax.lax.fori_loop(0, iterations, improve, start)


def _nearest_level(values: jax.Array, levels: jax.Array) -> jax.Array:
    """The index of the nearest of the ascending levels for each value, int32. A tie goes to the lower level."""
    return jnp.searchsorted((levels[1:] + levels[:-1]) / 2, values).astype(jnp.int32)


def share_weights(params: PyTree, counts: int | Mapping[str, int]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Clusters the kept mean weights of every layer.

    Args:
      params: A tree with variational layers, pruned or not.
      counts: The number of levels, for all layers or by layer name.

    Returns:
      Two dictionaries by layer name: the index of each weight's level, int32 of the kernel's shape, -1 where pruned, and the levels, [count].

    Raises:
      ValueError: A number of levels is not from 1 to 32,767, a layer lacks one, or one names an unknown layer.
    """
    layers = variational_layers(params)
    by_layer = values_by_layer(counts, layers, "counts")
    assignments, levels = {}, {}
    for name, layer in layers.items():
        if not 1 <= by_layer[name] < 2**15:
            raise ValueError(f"counts holds {by_layer[name]} for layer {name}; it must be from 1 to 32767.")
        kernel, mask = layer.kernel_moments()[0], layer.kernel_mask
        levels[name] = cluster_values(kernel, mask, by_layer[name])
        assignments[name] = jnp.where(mask, _nearest_level(kernel, levels[name]), -1)
    return assignments, levels
