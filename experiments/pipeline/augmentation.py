"""Random changes of training images: mirroring and shifts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bcdl_jax.priors import example_normal


def augmented(images: jax.Array, key: jax.Array, *, mirror: bool = False, shift: int = 0) -> jax.Array:
    """Changes each image at random. The change depends on the key and on the image's index alone.

    Args:
      images: The images, [n, height, width, channels].
      key: A PRNG key.
      mirror: True to mirror each image left to right with probability 1/2.
      shift: The largest shift along each axis, in pixels. Pixels that enter at an edge are reflections of the image at that edge.

    Returns:
      The changed images, of the shape and the dtype of ``images``.

    Raises:
      ValueError: ``shift`` is negative, or not smaller than the height and the width of the images.
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


def _shifted(images: jax.Array, key: jax.Array, largest: int) -> jax.Array:
    # Normal numbers become integers from -largest to largest, with equal probabilities.
    uniform = jax.scipy.stats.norm.cdf(example_normal(key, (images.shape[0], 2)))
    shifts = jnp.clip(jnp.floor(uniform * (2 * largest + 1)), 0, 2 * largest).astype(jnp.int32) - largest
    for axis in (1, 2):
        size = images.shape[axis]
        indices = jnp.abs(jnp.arange(size) + shifts[:, axis - 1, None])
        indices = jnp.where(indices >= size, 2 * (size - 1) - indices, indices)
        images = jnp.take_along_axis(images, jnp.expand_dims(indices, (3 - axis, 3)), axis)
    return images
