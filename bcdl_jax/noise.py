"""Standard normal noise whose every number depends only on the key, the example and the position within the example.

This is the counter-based generator behind ``jax.random`` (Threefry-2x32 with 20 rounds [Salmon et al. 2011]), with the
example's index and the position within the example as its two counters, and the same transform to normal numbers. It is
written out here for speed: on a CPU, ``jax.random`` runs the rounds as a loop of small kernels, while the code below
becomes one kernel, about three times faster for the arrays of a training step.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def example_normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Independent standard normal numbers.

    Args:
      key: a PRNG key of any kind.
      shape: [examples, ...], with less than 2^32 examples and less than 2^32 numbers for each.
      dtype: of the result; the numbers are drawn in float32.

    Returns:
      An array of that shape. Row i is the same whatever the number of rows.
    """
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if data.shape[-1] != 2:  # not a Threefry key
        data = jax.random.bits(key, (2,), jnp.uint32)
    flat = (shape[0], math.prod(shape[1:]))
    example = jax.lax.broadcasted_iota(jnp.uint32, flat, 0)
    position = jax.lax.broadcasted_iota(jnp.uint32, flat, 1)
    bits, _ = threefry_2x32(data[0], data[1], example, position)
    # 23 random bits as the fraction of a number in [1, 2), and from there to (-1, 1).
    one_to_two = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(low, (one_to_two - 1) * (1 - low) + low)
    return (np.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)).astype(dtype).reshape(shape)


def threefry_2x32(
    key_0: jax.Array, key_1: jax.Array, counter_0: jax.Array, counter_1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Two random 32-bit words for each pair of counters, elementwise, all uint32."""
    keys = (key_0, key_1, key_0 ^ key_1 ^ jnp.uint32(_PARITY))
    left, right = counter_0 + keys[0], counter_1 + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            left = left + right
            right = left ^ ((right << jnp.uint32(rotation)) | (right >> jnp.uint32(32 - rotation)))
        left = left + keys[(block + 1) % 3]
        right = right + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return left, right
