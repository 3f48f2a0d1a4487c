"""A small vision transformer for MNIST: patches of 7 x 7 pixels, a class token and learned positions."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Attention and a hidden layer, each behind a layer norm and beside a shortcut.

    Attributes:
      width: The number of features.
      heads: The number of heads.
    """

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(normed, normed)
        hidden = nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(hidden)


class VisionTransformer(nn.Module):
    """Patches, blocks, and a dense layer on the class token.

    Attributes:
      classes: The number of classes.
      patch: The side of a patch in pixels.
      width: The number of features.
      heads: The number of heads.
      depth: The number of blocks.
    """

    classes: int = 10
    patch: int = 7
    width: int = 64
    heads: int = 4
    depth: int = 4

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """The class scores of images [examples, 28, 28, 1] of uint8."""
        x = images.astype(jnp.float32) / 255
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        for _ in range(self.depth):
            x = Block(self.width, self.heads)(x)
        return nn.Dense(self.classes)(nn.LayerNorm()(x)[:, 0])


def make(key: jax.Array) -> tuple[Any, Any]:
    """The function ``apply(variables, images)``, and new variables."""
    net = VisionTransformer()
    return net.apply, net.init(key, jnp.zeros((1, 28, 28, 1), jnp.uint8))
