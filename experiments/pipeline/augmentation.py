"""Training images as they might as well have been: mirrored and moved at random."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bcdl_jax.priors.noise import example_normal


def augmented(images: jax.Array, key: jax.Array, *, mirror: bool = False, shift: int = 0) -> jax.Array:
    """Images, each changed at random; how depends on the key and the image's place alone.

    Args:
      images: [n, height, width, channels].
      key: a PRNG key.
      mirror: whether each is mirrored, left to right, with probability 1/2.
      shift: by how many pixels each is moved at most, up or down and left or right; what comes in at an edge is what was there, reflected.

    Returns:
      An array like ``images``.

    Raises:
      ValueError: ``shift`` is negative, or not less than the height and the width.
    """
    if not 0 <= shift < min(images.shape[1:3]):
        raise ValueError(
            f"shift is {shift}; for images of shape {images.shape[1:]} it must be at least 0 and less than {min(images.shape[1:3])}."
        )
    if mirror:
        images = _mirrored(images, jax.random.fold_in(key, 1))
    return _shifted(images, jax.random.fold_in(key, 2), shift) if shift else images


def _mirrored(images: jax.Array, key: jax.Array) -> jax.Array:
    chosen = example_normal(key, (images.shape[0], 1, 1, 1)) > 0
    return jnp.where(chosen, images[:, :, ::-1], images)


def _shifted(images: jax.Array, key: jax.Array, most: int) -> jax.Array:
    # Normal numbers as equally likely whole ones from -most to most.
    uniform = jax.scipy.stats.norm.cdf(example_normal(key, (images.shape[0], 2)))
    moves = jnp.clip(jnp.floor(uniform * (2 * most + 1)), 0, 2 * most).astype(jnp.int32) - most
    for axis in (1, 2):
        size = images.shape[axis]
        places = jnp.abs(jnp.arange(size) + moves[:, axis - 1, None])
        places = jnp.where(places >= size, 2 * (size - 1) - places, places)
        images = jnp.take_along_axis(images, jnp.expand_dims(places, (3 - axis, 3)), axis)
    return images
