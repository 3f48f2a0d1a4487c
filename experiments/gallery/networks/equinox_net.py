"""A convolutional network for MNIST in Equinox. Its layers take one example, so it is mapped over the batch."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

CLASSES = 10


class Convolutions(eqx.Module):
    """Three convolutions with pooling, and two linear layers."""

    convolutions: list[eqx.nn.Conv2d]
    pool: eqx.nn.MaxPool2d
    hidden: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.convolutions = [
            eqx.nn.Conv2d(1, 16, 3, padding=1, key=keys[0]),
            eqx.nn.Conv2d(16, 32, 3, padding=1, key=keys[1]),
            eqx.nn.Conv2d(32, 32, 3, padding=1, key=keys[2]),
        ]
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.hidden = eqx.nn.Linear(32 * 3 * 3, 64, key=keys[3])
        self.last = eqx.nn.Linear(64, CLASSES, key=keys[4])

    def __call__(self, image: jax.Array) -> jax.Array:
        """The class scores of one image [28, 28, 1] of uint8. The channels of Equinox come first."""
        x = jnp.moveaxis(image.astype(jnp.float32) / 255, -1, 0)
        for convolution in self.convolutions:
            x = self.pool(jax.nn.relu(convolution(x)))
        return self.last(jax.nn.relu(self.hidden(jnp.ravel(x))))


def make(key: jax.Array) -> tuple[Any, Any]:
    """The function ``apply(params, images)``, and new params."""
    params, static = eqx.partition(Convolutions(key), eqx.is_array)

    def apply(params: Any, images: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(images)

    return apply, params
