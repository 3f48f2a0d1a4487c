"""An MLP-Mixer for MNIST in flax.nnx: patches of 4 x 4 pixels, mixed over the image and over the features in turn."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

PATCH, SIDE, CLASSES = 4, 28, 10


class Mixing(nnx.Module):
    """A hidden layer over the last axis, as wide as ``hidden``."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(width, hidden, rngs=rngs), nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    """A mixing of the patches and a mixing of the features, each behind a layer norm and beside a shortcut."""

    def __init__(self, patches: int, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.patches, self.features = Mixing(patches, 2 * patches, rngs), Mixing(width, 2 * width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mixed = self.patches(self.norms[0](x).swapaxes(1, 2)).swapaxes(1, 2)
        x = x + mixed
        return x + self.features(self.norms[1](x))


class Mixer(nnx.Module):
    """Patches, blocks, the mean over the patches and a linear layer."""

    def __init__(self, width: int, depth: int, rngs: nnx.Rngs):
        size = (PATCH, PATCH)
        self.embedding = nnx.Conv(1, width, size, strides=size, padding="VALID", rngs=rngs)
        self.blocks = nnx.List([Block((SIDE // PATCH) ** 2, width, rngs) for _ in range(depth)])
        self.norm, self.last = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The class scores of images [examples, 28, 28, 1] of uint8."""
        x = self.embedding(images.astype(jnp.float32) / 255)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(x).mean(1))


def make(key: jax.Array) -> tuple[Any, Any]:
    """The function ``apply(params, images)``, and new params."""
    graph, params = nnx.split(Mixer(64, 3, nnx.Rngs(key)))

    def apply(params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(images)

    return apply, params
