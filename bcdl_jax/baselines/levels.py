"""Layers whose weights are levels, that is, one of a few values: their kernels, and their nodes for the compressed file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree, map_named_layers
from bcdl_jax.compression.quantization import integer_bits
from bcdl_jax.compression.quantized_layer import QuantizedLayer, RoundedArray
from bcdl_jax.priors.posterior import Posterior, variational_layers


def kernels_from_levels(assignments: Mapping[str, jax.Array], levels: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The kernels by layer name, for training the levels.

    The gradient of a level is the sum of the gradients of its weights [H16 section 3.3].

    Args:
      assignments: The index of each weight's level by layer name, -1 where pruned.
      levels: The levels by layer name.
    """
    return {
        name: jnp.where(indices < 0, 0, levels[name][jnp.maximum(indices, 0)]) for name, indices in assignments.items()
    }


def reduce_to_levels(
    params: PyTree, assignments: Mapping[str, jax.Array], levels: Mapping[str, jax.Array], *, bias_bits: int = 8
) -> PyTree:
    """Replaces each variational layer by a ``QuantizedLayer`` of levels.

    Levels that no weight uses, and levels of 0, are left out. Biases are rounded to multiples of a step.

    Args:
      params: A tree with variational layers. Their masks and biases are used.
      assignments: The index of each weight's level by layer name, from ``share_weights`` or ``collapse``.
      levels: The levels by layer name, in any order.
      bias_bits: The number of bits of the integers of the biases, from 2 to 16.

    Raises:
      ValueError: ``bias_bits`` is out of range, or a layer has no assignments or no levels.
    """
    if not 2 <= bias_bits <= 16:
        raise ValueError(f"bias_bits is {bias_bits}; it must be from 2 to 16.")
    for argument, given in (("assignments", assignments), ("levels", levels)):
        if missing := [name for name in variational_layers(params) if name not in given]:
            raise ValueError(f"{argument} lacks layer {missing[0]}; it has {', '.join(given) or 'no layer'}.")

    def quantize(name: str, layer: Posterior) -> QuantizedLayer:
        integers, used = _level_numbers(layer, np.asarray(assignments[name]), np.asarray(levels[name]))
        bits = jnp.asarray(math.ceil(math.log2(max(1, len(used)))), jnp.int32)
        kernel = RoundedArray(jnp.asarray(integers), jnp.ones((), jnp.float32), bits)
        bias = _rounded_bias(layer, bias_bits)
        return QuantizedLayer.of(layer, kernel=kernel, bias=bias, levels=jnp.asarray(used, jnp.float32))

    return map_named_layers(quantize, params, Posterior)


def _level_numbers(layer: Posterior, indices: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each weight's level, int16, and the levels in use.

    The numbers are 1, 2, ... for positive levels in ascending order, -1, -2, ... for negative levels in descending order, and 0 for a
    pruned weight.
    """
    kept = (indices >= 0) & np.asarray(layer.kernel_mask)
    kernel = np.where(kept, levels[np.maximum(indices, 0)], 0)
    used = np.unique(kernel[kernel != 0])
    numbers = np.searchsorted(used, kernel) - np.sum(used < 0)
    return np.where(kernel == 0, 0, np.where(numbers >= 0, numbers + 1, numbers)).astype(np.int16), used


def _rounded_bias(layer: Posterior, bits: int) -> RoundedArray | None:
    """The rounded bias, or None for a layer without bias. The largest bias gets the largest integer."""
    moments = layer.bias_moments()
    if moments is None:
        return None
    mean, _ = moments
    largest = jnp.max(jnp.abs(mean), initial=0)
    step = jnp.where(largest > 0, largest / (2 ** (bits - 1) - 1), 1.0).astype(jnp.float32)
    integers = jnp.round(mean / step).astype(jnp.int16)
    return RoundedArray(integers, step, integer_bits(integers))
