"""Standard normal noise. Each number depends on the key, the index of the example and the position within the example alone.

The generator is Threefry-2x32 with 20 rounds [S11], the counter-based generator of ``jax.random``. Its two counters are the
index of the example and the position within the example. The Box-Muller transform [BM58] turns its two words into one normal number.

Both are written out here, since they are faster on a CPU in this form. ``jax.random`` runs the rounds as a loop of small kernels. XLA's
cosine is slow. XLA also computes a value again for each of its uses, unless the last operation is expensive. The division at the end is such
an operation, so that the gradient reads the noise that the forward pass stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def example_normal(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32, order: Sequence[int] | None = None
) -> jax.Array:
    """Draws independent standard normal numbers.

    Args:
      key: A PRNG key of any kind, typed or raw.
      shape: The shape of the result, with its axes in the given ``order``. There are fewer than 2^32 examples, and fewer than 2^32 numbers
        for each of them.
      dtype: The dtype of the result. The numbers are drawn in float32.
      order: The permutation of the axes, as for ``jax.numpy.transpose``, that turns an array [examples, ...] into the result. None for
        [examples, ...].

    Returns:
      An array of shape ``shape``. The numbers of example i depend neither on the number of examples nor on ``order``.
    """
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if data.shape[-1] != 2:  # not a Threefry key
        data = jax.random.bits(key, (2,), jnp.uint32)
    order = range(len(shape)) if order is None else order
    example = jax.lax.broadcasted_iota(jnp.uint32, shape, list(order).index(0))
    position, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in range(len(shape) - 1, 0, -1):
        place = list(order).index(axis)
        position += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, shape, place)
        stride *= shape[place]
    first, second = threefry_2x32(data[0], data[1], example, position)
    radius = jnp.sqrt(-2 * jnp.log(2 - _one_to_two(first)))
    # cos(pi turn) = sin(angle), for a turn in [-1, 1) and an angle in [-pi / 2, pi / 2]. The rational function below is a fit to the sine
    # on that interval, with an error of at most 3e-9.
    turn = 2 * _one_to_two(second) - 3
    angle = math.pi * (0.5 - jnp.abs(turn))
    square = angle * angle
    numerator = angle * (1 + square * (-0.133100558 + square * 0.00322897433))
    denominator = 1 + square * (0.0335659119 + square * 0.000490414751)
    return (radius * numerator / denominator).astype(dtype)


def _one_to_two(bits: jax.Array) -> jax.Array:
    """Uniform numbers in [1, 2), whose fractions are 23 random bits."""
    return jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)


def threefry_2x32(
    key_0: jax.Array, key_1: jax.Array, counter_0: jax.Array, counter_1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Two random words for each pair of counters, elementwise. All arrays are uint32."""
    keys = (key_0, key_1, key_0 ^ key_1 ^ jnp.uint32(_PARITY))
    left, right = counter_0 + keys[0], counter_1 + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            left = left + right
            right = left ^ ((right << jnp.uint32(rotation)) | (right >> jnp.uint32(32 - rotation)))
        left = left + keys[(block + 1) % 3]
        right = right + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return left, right
