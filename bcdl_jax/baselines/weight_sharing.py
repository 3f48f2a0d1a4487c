"""Weights that share a few values: clustering by k-means, and layers of levels for the compressed file [Han et al. 2016, section 3].

From a plain network that was pruned weight by weight, with ``masks`` for it (see ``magnitude_pruning``), to a file; ``model`` is its
variational twin, with layers of the family ``SparseVariationalDropout()`` and the same names:

    fresh = model.init(key, inputs)["params"]
    pruned = bcdl_jax.compression.prune_units(bcdl_jax.from_trained(fresh, params), bcdl_jax.baselines.kernels_by_layer(masks), chain)
    places, levels = bcdl_jax.baselines.share_weights(pruned, 32)
    bcdl_jax.save("model.bcdl", bcdl_jax.baselines.reduce_to_levels(pruned, places, levels))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree, map_named_layers, values_by_layer
from bcdl_jax.compression.quantization import integer_bits
from bcdl_jax.compression.quantized_layer import QuantizedLayer
from bcdl_jax.priors.posterior import Posterior, variational_layers


@functools.partial(jax.jit, static_argnums=2)
def cluster_values(values: jax.Array, keep: jax.Array, count: int, iterations: int = 50) -> jax.Array:
    """The centres of k-means over some values, from centres at equal distances between the extremes [H16 section 3.2].

    Args:
      values: of any shape.
      keep: bools that broadcast against them; the others do not count.
      count: number of centres.
      iterations: of Lloyd's algorithm.

    Returns:
      [count], ascending. A centre that no value is nearest to stays where it was.
    """
    values, keep = values.ravel(), jnp.broadcast_to(keep, values.shape).ravel()
    low = jnp.min(values, where=keep, initial=jnp.inf)
    high = jnp.max(values, where=keep, initial=-jnp.inf)
    start = jnp.where(jnp.any(keep), jnp.linspace(low, high, count), 0.0).astype(values.dtype)

    def improve(_: jax.Array, centres: jax.Array) -> jax.Array:
        nearest = nearest_level(values, centres)
        sizes = jax.ops.segment_sum(keep.astype(values.dtype), nearest, count)
        sums = jax.ops.segment_sum(jnp.where(keep, values, 0), nearest, count)
        return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1), centres)

    return jax.lax.fori_loop(0, iterations, improve, start)


def nearest_level(values: jax.Array, levels: jax.Array) -> jax.Array:
    """For each value the place of the nearest of the ascending levels, int32; of two at the same distance, the lower."""
    return jnp.searchsorted((levels[1:] + levels[:-1]) / 2, values).astype(jnp.int32)


def share_weights(params: PyTree, counts: int | Mapping[str, int]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Clusters the kept mean weights of every layer.

    Args:
      params: tree with variational layers, pruned or not.
      counts: number of levels, for all layers or by layer name.

    Returns:
      By layer name, the place of each weight's level, int32 of the kernel's shape (-1 where pruned), and the levels, [count].

    Raises:
      ValueError: a number of levels that is not from 1 to 32,767, or a layer without one, or one for a layer that is not there.
    """
    layers = variational_layers(params)
    by_layer = values_by_layer(counts, layers, "counts")
    assignments, levels = {}, {}
    for name, layer in layers.items():
        if not 1 <= by_layer[name] < 2**15:
            raise ValueError(f"counts holds {by_layer[name]} for layer {name}; it must be from 1 to 32767.")
        kernel, mask = layer.kernel_moments()[0], layer.kernel_mask
        levels[name] = cluster_values(kernel, mask, by_layer[name])
        assignments[name] = jnp.where(mask, nearest_level(kernel, levels[name]), -1)
    return assignments, levels


def kernels_from_levels(assignments: Mapping[str, jax.Array], levels: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The kernels by layer name; differentiable in the levels, each of which gets the sum of its weights' gradients [H16 section 3.3]."""
    return {
        name: jnp.where(places < 0, 0, levels[name][jnp.maximum(places, 0)]) for name, places in assignments.items()
    }


def reduce_to_levels(
    params: PyTree, assignments: Mapping[str, jax.Array], levels: Mapping[str, jax.Array], *, bias_bits: int = 8
) -> PyTree:
    """The tree with a ``QuantizedLayer`` of levels in place of each variational layer.

    Levels that are not used, or are 0, are left out. Biases are rounded to multiples of a step of their own.

    Args:
      params: tree with variational layers, of which the masks and the biases are taken.
      assignments: by layer name, from ``share_weights``.
      levels: by layer name; in any order.
      bias_bits: of the integers of the biases, from 2 to 16.

    Raises:
      ValueError: ``bias_bits`` is out of range, or a layer has no assignments or levels.
    """
    if not 2 <= bias_bits <= 16:
        raise ValueError(f"bias_bits is {bias_bits}; it must be from 2 to 16.")
    for what, given in (("assignments", assignments), ("levels", levels)):
        if missing := [name for name in variational_layers(params) if name not in given]:
            raise ValueError(f"{what} has nothing for layer {missing[0]}; it has {', '.join(given) or 'nothing'}.")

    def quantize(name: str, layer: Posterior) -> QuantizedLayer:
        places, values = np.asarray(assignments[name]), np.asarray(levels[name])
        kept = (places >= 0) & np.asarray(layer.kernel_mask)
        kernel = np.where(kept, values[np.maximum(places, 0)], 0)
        used = np.unique(kernel[kernel != 0])
        # 1 and on for the positive ones, -1 and on downwards for the negative ones.
        numbers = np.searchsorted(used, kernel) - np.sum(used < 0)
        integers = np.where(kernel == 0, 0, np.where(numbers >= 0, numbers + 1, numbers)).astype(np.int16)
        bias = layer.bias_moments()
        bias_mean = None if bias is None else bias[0]
        scalars: dict[str, Any] = {"bias": None, "bias_step": None, "bias_bits": None}
        if bias_mean is not None:
            largest = jnp.max(jnp.abs(bias_mean), initial=0)
            step = jnp.where(largest > 0, largest / (2 ** (bias_bits - 1) - 1), 1.0).astype(jnp.float32)
            rounded = jnp.round(bias_mean / step).astype(jnp.int16)
            scalars = {"bias": rounded, "bias_step": step, "bias_bits": integer_bits(rounded)}
        return QuantizedLayer(
            kernel=jnp.asarray(integers),
            kernel_step=jnp.ones((), jnp.float32),
            kernel_bits=jnp.asarray(math.ceil(math.log2(max(1, len(used)))), jnp.int32),
            **scalars,
            input_mask=layer.input_mask > 0,
            output_mask=layer.output_mask > 0,
            group_axis=layer.group_axis,
            prunes_weights=layer.prunes_weights,
            kernel_levels=jnp.asarray(used, jnp.float32),
        )

    return map_named_layers(quantize, params, Posterior)
